"""Claims that are made ahead, with the entry of the cell before: used, given back, lost."""

from __future__ import annotations

import os
import signal
from typing import Any

from nbos_cluster import membership
from nbos_cluster.etcd import Etcd
from nbos_cluster.kernelview import Held
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Host, Replica, create, grants_of, kernel_spec, view_of
from tests.system.etcdserver import eventually


async def on_one_host(client: Etcd, host: MakeHost, **config: Any) -> tuple[Host, Replica]:
    a = host("a", **config)
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    return a, replica


async def on_two_hosts(client: Etcd, host: MakeHost, **config: Any) -> tuple[Host, Replica, Replica]:
    """The first one's daemon, and the replicas."""
    a, b = host("a", **config), host("b", **config)
    await create(client, kernel_spec("k", "a", "b"))
    replicas = a.replica("k", 0), b.replica("k", 1)
    for replica in replicas:
        await replica.ready()
    return a, *replicas


async def claimed(client: Etcd, n: int) -> Held | None:
    return (await view_of(client, "k")).claim_of(n)


async def in_a_row(client: Etcd, replica: Replica, first: int, last: int) -> Held:
    """Cells that follow each other at once; the claim of last+1 that was made with the last one's entry."""
    await replica.order(cells=[first, last])
    held = await claimed(client, last + 1)
    assert held is not None
    assert held.record.ahead
    assert held.token == (await view_of(client, "k")).log_revs[last]
    return held


async def free_again(client: Etcd, n: int) -> None:
    async def free() -> bool:
        return await claimed(client, n) is None

    await eventually(free, f"execution {n} is given back", 4)
    assert (await view_of(client, "k")).last == n - 1, "and not decided"


async def test_a_cell_that_follows_at_once_runs_under_the_claim_of_the_entry_before(
    client: Etcd, host: MakeHost
) -> None:
    _, first, second = await on_two_hosts(client, host)
    assert (await first.append(1, (await first.bid(1))["token"]))["ok"]
    assert await claimed(client, 2) is None, "one cell is no row"
    held = await in_a_row(client, first, 2, 3)
    await second.ready(applied=3)
    assert (await second.bid(4))["code"] == "taken"
    assert (await first.bid(4))["token"] == held.token
    assert (await first.append(4, held.token))["ok"]
    entries = (await view_of(client, "k")).log
    assert [(entries[n].kind, entries[n].replica) for n in (1, 2, 3, 4)] == [("cell", 0)] * 4


async def test_a_number_that_nobody_asks_for_is_given_back_to_all(client: Etcd, host: MakeHost) -> None:
    _, first, second = await on_two_hosts(client, host)
    await in_a_row(client, first, 1, 2)
    await free_again(client, 3)
    await second.ready(applied=2)
    assert (await second.bid(3))["answer"] == "lead"
    assert (await first.bid(3))["code"] == "taken"


async def test_a_replica_that_dies_gives_its_number_back_at_once(client: Etcd, host: MakeHost) -> None:
    _, first, second = await on_two_hosts(client, host, lease_ttl=60)
    pid = (await first.ready())["pid"]
    await in_a_row(client, first, 1, 2)
    os.kill(pid, signal.SIGKILL)
    await free_again(client, 3)
    await second.ready(applied=2)
    assert (await second.bid(3))["answer"] == "lead"


async def test_a_cell_that_wants_a_gpu_is_claimed_together_with_it(client: Etcd, host: MakeHost) -> None:
    _, replica = await on_one_host(client, host)
    held = await in_a_row(client, replica, 1, 2)
    lead = await replica.bid(3, gpus=1)
    assert lead["token"] > held.token
    (grant,) = await grants_of(client, "a")
    assert (grant.n, grant.grant) == (3, lead["grant"]["grant"])
    assert (await replica.append(3, lead["token"]))["ok"]
    assert await claimed(client, 4) is None, "what it will need is not known yet"


async def test_a_number_that_its_replica_yielded_is_claimed_anew(client: Etcd, host: MakeHost) -> None:
    """Not taken for its own still, whatever the daemon's copy of the records says at that moment."""
    _, replica = await on_one_host(client, host)
    for n in (3, 6, 9):
        held = await in_a_row(client, replica, n - 2, n - 1)
        assert (await replica.bid(n, gpus=99))["code"] == "impossible"
        lead = await replica.bid(n)
        assert lead["token"] > held.token
        now = await claimed(client, n)
        assert now is not None
        assert now.token == lead["token"]
        assert (await replica.append(n, lead["token"]))["ok"]


async def test_a_daemon_that_starts_again_neither_loses_nor_decides_the_number(client: Etcd, host: MakeHost) -> None:
    a, replica = await on_one_host(client, host, lease_ttl=60)
    held = await in_a_row(client, replica, 1, 2)
    a.kill()
    a.start()
    await replica.ready(applied=2)
    lead = await replica.bid(3)
    assert lead["token"] == held.token
    assert (await replica.append(3, lead["token"]))["ok"]
    await in_a_row(client, replica, 4, 5)
    a.kill()
    a.start()

    async def free() -> bool:
        return await claimed(client, 6) is None

    await eventually(free, "given back, since nobody asks for it", 20)
    assert (await view_of(client, "k")).last == 5
    assert (await replica.bid(6))["answer"] == "lead"


async def test_a_host_that_was_paused_past_its_lease_does_not_run_the_number_that_another_took(
    client: Etcd, host: MakeHost
) -> None:
    a, first, second = await on_two_hosts(client, host)
    await in_a_row(client, first, 1, 2)
    assert a.process is not None
    a.process.send_signal(signal.SIGSTOP)
    await second.ready(applied=2)

    async def leads() -> bool:
        return bool((await second.bid(3))["answer"] == "lead")

    await eventually(leads, "it ends with the lease", 15)
    a.process.send_signal(signal.SIGCONT)
    assert (await first.bid(3))["code"] in ("taken", "unavailable")
    held = await claimed(client, 3)
    assert held is not None
    assert held.record.host == "b"
    assert (await second.append(3, held.token))["ok"]


async def test_a_restart_by_the_user_ends_it(client: Etcd, host: MakeHost) -> None:
    _, replica = await on_one_host(client, host)
    await in_a_row(client, replica, 1, 2)
    assert (await client.commit(membership.restart(await view_of(client, "k")))).succeeded

    async def replaced() -> bool:
        state = await replica.order()
        return bool(state) and state["hello"].get("incarnation") == 2

    await eventually(replaced, "a new process of incarnation 2", 5)
    assert (await view_of(client, "k")).claims == {}
    await replica.ready(applied=3)
    assert (await replica.bid(4))["answer"] == "lead"
