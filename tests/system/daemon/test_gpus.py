"""GPUs of real daemons: who waits is told, served in turn, and leaves on cancel; what can never be is refused."""

from __future__ import annotations

import asyncio

from nbos_cluster import keys
from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import create, grants_of, kernel_spec
from tests.system.etcdserver import eventually


async def test_a_cell_waits_for_a_busy_gpu_is_told_why_and_gets_it_when_it_is_released(
    client: Etcd, host: MakeHost
) -> None:
    a = host("a")
    for kernel in ("k", "other", "third"):
        await create(client, kernel_spec(kernel, "a", owner=kernel))
    first, second, third = (a.replica(k, 0) for k in ("k", "other", "third"))
    for replica in (first, second, third):
        await replica.ready()
    lead = await first.bid(1, gpus=2)
    assert (await second.bid(1, gpus=1))["code"] == "busy"
    waiting = asyncio.create_task(second.bid(1, gpus=1, wait=True))

    async def told() -> bool:
        return bool(await second.pushed("waiting"))

    await eventually(told, "told why it waits", 3)
    last = (await second.pushed("waiting"))[-1]
    assert (last["n"], last["position"], last["of"]) == (1, 1, 1)
    assert "0 of 2 GPUs" in last["reason"]
    assert (await third.bid(1))["answer"] == "lead", "a CPU cell never waits"

    async def ticket() -> bool:
        return len((await client.range(keys.queue("a")))[0]) == 1

    await eventually(ticket, "the queue is shown in etcd", 4)
    await first.send("release", n=1)
    answer = await waiting
    assert answer["answer"] == "lead"
    assert answer["grant"]["shares"][0]["whole"] is True
    assert [g.kernel for g in await grants_of(client, "a")] == ["other"]
    assert (await first.append(1, lead["token"]))["ok"]

    async def no_ticket() -> bool:
        return (await client.range(keys.queue("a")))[0] == []

    await eventually(no_ticket, "the ticket is gone", 4)


async def test_cancel_leaves_the_queue(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    for kernel in ("k", "other"):
        await create(client, kernel_spec(kernel, "a"))
    first, second = a.replica("k", 0), a.replica("other", 0)
    await first.ready()
    await second.ready()
    await first.bid(1, gpus=2)
    waiting = asyncio.create_task(second.bid(1, gpus=1, wait=True))

    async def told() -> bool:
        return bool(await second.pushed("waiting"))

    await eventually(told, "it waits", 3)
    await second.send("cancel", n=1)
    assert (await waiting)["code"] == "cancelled"
    assert (await second.bid(1))["answer"] == "lead"


async def test_a_wait_ends_when_another_replica_of_the_kernel_runs_the_cell(client: Etcd, host: MakeHost) -> None:
    a, b = host("a"), host("b")
    await create(client, kernel_spec("busy", "a"))
    await create(client, kernel_spec("k", "a", "b"))
    blocker, first, second = a.replica("busy", 0), a.replica("k", 0), b.replica("k", 1)
    for replica in (blocker, first, second):
        await replica.ready()
    await blocker.bid(1, gpus=2)
    waiting = asyncio.create_task(first.bid(1, gpus=1, wait=True))

    async def told() -> bool:
        return bool(await first.pushed("waiting"))

    await eventually(told, "it waits", 3)
    assert (await second.bid(1, gpus=1, wait=True))["answer"] == "lead"
    assert (await waiting)["code"] == "taken"


async def test_what_no_wait_can_give_is_impossible(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    many = await replica.bid(1, gpus=3, wait=True)
    assert many["code"] == "impossible"
    assert "ask for at most 2" in many["reason"]
    slices = await replica.bid(1, tpcs=65, wait=True)
    assert "slices of 64 TPCs" in slices["reason"]
