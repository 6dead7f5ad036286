"""Accounts of real daemons: what was held is accounted to the second, through kill -9 and restarts, and is in etcd."""

from __future__ import annotations

import os
import signal
import time

from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import HourRecord, UseLine
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import create, kernel_spec
from tests.system.etcdserver import eventually


async def lines(client: Etcd, host: str = "a") -> list[UseLine]:
    found, _ = await client.range(keys.accounts(host))
    return [line for kv in found for line in records.decode(kv.value, HourRecord).lines]


async def seconds_of(client: Etcd, owner: str) -> float:
    return sum(line.seconds for line in await lines(client) if line.owner == owner)


async def test_cells_are_accounted_to_their_owner_groups_and_kernel(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    for owner, groups in (("ann", ("vision",)), ("bob", ())):
        await create(client, kernel_spec(f"k-{owner}", "a", owner=owner, groups=groups))
    held = {}
    for owner, asked in (("ann", {"tpcs": 4}), ("bob", {"gpus": 1})):
        replica = a.replica(f"k-{owner}", 0)
        await replica.ready()
        began = time.monotonic()
        assert (await replica.bid(1, **asked))["answer"] == "lead"
        await eventually(lambda began=began: after(began + 1.3), "it runs for a while", 5)  # type: ignore[misc]
        await replica.send("release", n=1)
        held[owner] = time.monotonic() - began

    async def published() -> bool:
        return sum(line.cells for line in await lines(client)) == 2

    await eventually(published, "the accounts stand in etcd", 15)
    by_owner = {line.owner: line for line in await lines(client)}
    ann, bob = by_owner["ann"], by_owner["bob"]
    assert (ann.kernel, ann.groups, ann.cells) == ("k-ann", ("vision",), 1)
    for owner, line in by_owner.items():
        assert held[owner] - 0.5 <= line.seconds <= held[owner]
    assert abs(ann.device_seconds - ann.seconds / 2) < 1e-6, "4 of 8 TPCs"
    assert abs(ann.tpc_seconds - ann.seconds * 4) < 1e-6
    assert abs(bob.byte_seconds - bob.seconds * 8 * 2**30) < 1


async def after(moment: float) -> bool:
    return time.monotonic() >= moment


async def test_a_cell_that_outlives_a_killed_daemon_is_accounted_without_a_gap(client: Etcd, host: MakeHost) -> None:
    a = host("a", lease_ttl=10)
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    began = time.monotonic()
    lead = await replica.bid(1, gpus=1)
    assert lead["answer"] == "lead"
    a.kill()
    await eventually(lambda: after(began + 2.5), "the daemon is away", 5)
    a.start()
    await replica.ready()
    await eventually(lambda: after(began + 4), "it runs on", 20)
    assert (await replica.append(1, lead["token"]))["ok"]
    held = time.monotonic() - began

    async def published() -> bool:
        return sum(line.cells for line in await lines(client)) == 1

    await eventually(published, "the accounts stand in etcd", 15)
    assert held - 1.0 <= await seconds_of(client, "ann") <= held


async def test_a_cell_that_ended_with_its_daemon_is_accounted_until_the_last_moment_known(
    client: Etcd, host: MakeHost
) -> None:
    a = host("a", lease_ttl=10)
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    pid = (await replica.ready())["pid"]
    began = time.monotonic()
    assert (await replica.bid(1, gpus=1))["answer"] == "lead"
    await eventually(lambda: after(began + 2.5), "it runs for a while", 5)
    a.kill()
    held = time.monotonic() - began
    os.killpg(pid, signal.SIGKILL)
    await eventually(lambda: after(began + 5), "nothing runs for a while", 10)
    a.start()

    async def published() -> bool:
        return await seconds_of(client, "ann") > 0

    await eventually(published, "the accounts stand in etcd", 20)
    assert held - 1.3 <= await seconds_of(client, "ann") <= held, "the daemon settles every second"
