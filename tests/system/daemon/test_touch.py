"""A running cell asks its daemon for a GPU on its way: under its claim, in the queue like anybody, and never for longer
than it lives."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from nbos_cluster import keys
from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Host, Replica, create, grants_of, kernel_spec
from tests.system.etcdserver import eventually


async def begin(replica: Replica, n: int = 1, **wants: int) -> Any:
    """A cell that begins without a GPU and may ask for `wants` later."""
    await replica.ready()
    bid = {"n": n, "attempt": 1, "kind": "cell", "resources": {}, "wait": False, "applied": n - 1}
    return await replica.send("bid", **bid, touch=wants)


async def touch(replica: Replica, token: int, n: int = 1, seconds: float = 20.0, **wants: int) -> Any:
    return await replica.send("touch", seconds=seconds, n=n, token=token, resources=wants)


async def two(client: Etcd, host: MakeHost, **config: Any) -> tuple[Host, Replica, Replica]:
    a = host("a", **config)
    for kernel in ("k", "other"):
        await create(client, kernel_spec(kernel, "a", owner=kernel))
    return a, a.replica("k", 0), a.replica("other", 0)


async def waits(replica: Replica) -> dict[str, Any]:
    async def told() -> bool:
        return bool(await replica.pushed("waiting"))

    await eventually(told, "told why it waits", 3)
    return (await replica.pushed("waiting"))[-1]


async def no_grants(client: Etcd) -> None:
    async def none() -> bool:
        return not await grants_of(client, "a")

    await eventually(none, "no grant is left in etcd", 5)


async def test_a_cell_begins_at_once_while_another_trains_and_waits_where_it_touches(
    client: Etcd, host: MakeHost
) -> None:
    _, trains, cell = await two(client, host)
    await trains.ready()
    await trains.bid(1, gpus=2)
    lead = await begin(cell, gpus=1)
    assert (lead["answer"], lead["grant"], lead["touch"]) == ("lead", None, {"devices": 1, "real": False})
    asked = asyncio.create_task(touch(cell, lead["token"], gpus=1))
    told = await waits(cell)
    assert (told["n"], told["position"], told["of"]) == (1, 1, 1)
    await trains.send("release", n=1)
    answer = await asked
    assert answer["ok"]
    assert answer["grant"]["shares"][0]["whole"] is True
    assert [(g.kernel, g.n) for g in await grants_of(client, "a")] == [("other", 1)]
    assert (await touch(cell, lead["token"], gpus=1))["grant"] == answer["grant"], "asked again: the same one"
    assert (await cell.append(1, lead["token"]))["ok"]
    assert await grants_of(client, "a") == [], "it ends in the transaction that ends the claim"


async def test_cancel_leaves_the_queue_and_the_cell_may_ask_again(client: Etcd, host: MakeHost) -> None:
    _, trains, cell = await two(client, host)
    await trains.ready()
    await trains.bid(1, gpus=2)
    lead = await begin(cell, gpus=1)
    asked = asyncio.create_task(touch(cell, lead["token"], gpus=1))
    await waits(cell)
    await cell.send("cancel", n=1)
    assert (await asked)["error"] == "cancelled"
    again = asyncio.create_task(touch(cell, lead["token"], gpus=1))
    await trains.send("release", n=1)
    assert (await again)["ok"]
    await cell.send("release", n=1)
    await no_grants(client)


async def test_who_does_not_run_the_cell_gets_nothing(client: Etcd, host: MakeHost) -> None:
    _, other, cell = await two(client, host)
    lead = await begin(cell, gpus=1)
    await other.ready()
    assert (await touch(other, lead["token"], gpus=1))["error"] == "fenced"
    assert (await touch(cell, lead["token"] - 1, gpus=1))["error"] == "fenced"
    assert (await touch(cell, lead["token"], gpus=9))["error"] == "impossible"
    assert await grants_of(client, "a") == []
    assert (await cell.append(1, lead["token"]))["ok"]
    assert (await touch(cell, lead["token"], gpus=1))["error"] == "fenced", "it is over"


async def test_a_cell_killed_while_it_waits_leaves_the_queue_and_one_killed_with_its_grant_leaves_none(
    client: Etcd, host: MakeHost
) -> None:
    _, trains, cell = await two(client, host)
    await trains.ready()
    await trains.bid(1, gpus=2)
    lead = await begin(cell, gpus=1)
    asked = asyncio.create_task(touch(cell, lead["token"], gpus=1))
    await waits(cell)

    async def tickets(count: int) -> bool:
        return len((await client.range(keys.queue("a")))[0]) == count

    await eventually(lambda: tickets(1), "its ticket is there", 5)
    os.kill((await cell.order())["pid"], signal.SIGKILL)
    await eventually(lambda: tickets(0), "its ticket is gone", 5)
    assert await asked is None
    await trains.send("release", n=1)
    await cell.ready(1)
    lead = await begin(cell, 2, gpus=2)
    assert (await touch(cell, lead["token"], 2, gpus=2))["ok"]
    os.kill((await cell.order())["pid"], signal.SIGKILL)
    await no_grants(client)
    await cell.ready(2)
    assert (await begin(cell, 3, gpus=2))["answer"] == "lead"


async def test_a_daemon_killed_with_a_cell_in_its_queue_or_with_its_grant_goes_on_where_it_was(
    client: Etcd, host: MakeHost
) -> None:
    a, trains, cell = await two(client, host)
    await trains.ready()
    await trains.bid(1, gpus=2)
    lead = await begin(cell, gpus=1)
    asked = asyncio.create_task(touch(cell, lead["token"], gpus=1))
    await waits(cell)
    a.kill()
    a.start()
    await trains.ready()
    assert [g.kernel for g in await grants_of(client, "a")] == ["k"]
    await trains.send("release", n=1)
    answer = await asked
    assert answer["ok"], "the request was repeated on the new connection"
    a.kill()
    a.start()
    await cell.ready()
    assert (await trains.bid(2, gpus=2))["code"] == "busy", "the new daemon knows what is taken"
    assert [g.grant for g in await grants_of(client, "a")] == [answer["grant"]["grant"]]
    token = max([lead["token"], *(m["token"] for m in await cell.pushed("token"))])  # its lease may have ended
    again = await touch(cell, token, gpus=1)
    assert again.get("grant") == answer["grant"], again
    assert (await cell.append(1, token))["ok"]
    await no_grants(client)


async def test_the_grant_of_a_claim_that_ended_with_its_lease_comes_back_with_it(client: Etcd, host: MakeHost) -> None:
    a, _, cell = await two(client, host)
    lead = await begin(cell, tpcs=2)
    answer = await touch(cell, lead["token"], tpcs=2)
    assert a.process is not None
    os.kill(a.process.pid, signal.SIGSTOP)
    await no_grants(client)
    os.kill(a.process.pid, signal.SIGCONT)

    async def back() -> bool:
        return [g.grant for g in await grants_of(client, "a")] == [answer["grant"]["grant"]]

    await eventually(back, "claim and grant are renewed", 10)
    (token,) = [m["token"] for m in await cell.pushed("token")]
    assert (await cell.append(1, token))["ok"]
    await no_grants(client)


async def test_where_no_wait_would_help_or_the_site_says_so_it_asks_before_it_starts(
    client: Etcd, host: MakeHost
) -> None:
    _, cell, other = await two(client, host)
    never = await begin(cell, gpus=3)
    assert never["code"] == "impossible", "another host may have what it needs"
    b = host("b", gpu_on_touch=False)
    await create(client, kernel_spec("third", "b"))
    third = b.replica("third", 0)
    assert (await third.ready())["hello"]["touch"] is False
    lead = await begin(third, gpus=1)
    assert lead["grant"]["shares"]
    assert "touch" not in lead
    assert (await begin(other, tpcs=2))["touch"]["devices"] == 1
