"""A lease notices that etcd stood still, also where its own was prolonged in time."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from nbos_cluster.lease import Lease


class SlowEtcd:
    """Answers after `seconds`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def lease_grant(self, ttl: float) -> int:
        return 7

    async def lease_refresh(self, lease: int) -> None:
        await asyncio.sleep(self.seconds)


async def test_an_answer_that_took_a_third_of_the_lease_says_that_others_may_have_ended() -> None:
    etcd: Any = SlowEtcd()
    lease = Lease(etcd, ttl=3.0)
    await lease._turn()
    assert lease.still_at == -math.inf
    etcd.seconds, lease.ttl = 0.02, 0.03
    await lease._turn()
    assert lease.still_at <= time.monotonic()
    assert lease.id == 7, "its own has not ended"


async def test_a_lease_is_sure_for_its_time_after_it_was_asked_for() -> None:
    etcd: Any = SlowEtcd()
    lease = Lease(etcd, ttl=30.0)
    assert lease.sure_id == 0
    await lease._turn()
    assert lease.sure_id == 7
    etcd.seconds, lease.ttl = 0.02, 0.01
    await lease._turn()
    assert (lease.id, lease.sure_id) == (7, 0), "it may have ended while the answer was on its way"
