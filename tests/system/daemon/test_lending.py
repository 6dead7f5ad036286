"""Loans of a real daemon: they go back when their owner asks, also when daemons and borrowers are killed meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Host, Replica, create, grants_of, kernel_spec
from tests.system.daemon.test_accounts import lines
from tests.system.hubclient import eventually

SITE: dict[str, Any] = {
    "simulated_devices": 1,
    "lease_ttl": 10,
    "shares": {"users": {"ann": {"tpcs": 4, "memory": "2G"}}},
}
GIB = 1 << 30


@dataclass
class Party:
    """A kernel's one replica. waiting: its bid."""

    replica: Replica
    pid: int
    waiting: asyncio.Task[Any] | None = None

    async def bid(self, tpcs: int, borrow: int = 0) -> Any:
        asked = {"gpus": 0, "tpcs": tpcs, "memory": 2 * GIB, "model": ""}
        bid = {"n": 1, "attempt": 1, "kind": "cell", "resources": asked, "wait": True, "applied": 0, "borrow": borrow}
        return await self.replica.send("bid", seconds=60.0, **bid)

    def ask(self, tpcs: int) -> None:
        self.waiting = asyncio.create_task(self.bid(tpcs))

    async def granted(self) -> set[int]:
        """The TPCs of the bid that waits."""
        assert self.waiting is not None
        answer = await asyncio.wait_for(self.waiting, 20)
        assert answer["answer"] == "lead", answer
        return set(answer["grant"]["shares"][0]["tpcs"])

    async def told(self, count: int, after: int = 0) -> dict[str, Any]:
        """The newest message about its slice, once that is of so many TPCs."""

        async def there() -> dict[str, Any] | None:
            found = await self.replica.pushed("slice")
            newest = found[-1] if found else {"tpcs": None, "version": -1}
            return newest if newest["version"] > after and len(newest["tpcs"]) == count else None

        return dict(await eventually(there, f"it is told to be on {count} TPCs", 20))

    async def gives(self, message: dict[str, Any]) -> set[int]:
        await self.replica.send("sliced", n=1, version=message["version"])
        return set(message["tpcs"])


async def parties(client: Etcd, host: MakeHost, **site: Any) -> tuple[Host, Party, Party]:
    """ann is owed 4 of 8 TPCs, eve nothing; eve's cell is on all 8."""
    a = host("a", **{**SITE, **site})
    found = []
    for owner in ("ann", "eve"):
        await create(client, kernel_spec(f"k-{owner}", "a", owner=owner))
        replica = a.replica(f"k-{owner}", 0)
        found.append(Party(replica, (await replica.ready())["pid"]))
    ann, eve = found
    share = (await eve.bid(8))["grant"]["shares"][0]
    assert (len(share["tpcs"]), len(share["lent"])) == (8, 4)
    return a, ann, eve


async def test_a_loan_goes_back_is_lent_again_and_is_accounted_to_the_second(client: Etcd, host: MakeHost) -> None:
    _, ann, eve = await parties(client, host)
    moments = [time.monotonic()]
    ann.ask(4)
    left = await eve.told(4)
    assert ann.waiting is not None
    assert not ann.waiting.done(), "eve's cell did not say that it is off them"
    kept = await eve.gives(left)
    assert await ann.granted() == set(range(8)) - kept
    moments.append(time.monotonic())
    await eventually(lambda: passed(moments[1] + 1.5), "both run", 5)
    held = {grant.owner: set(grant.shares[0].tpcs) for grant in await grants_of(client, "a")}
    assert held == {"eve": kept, "ann": set(range(8)) - kept}
    await ann.replica.send("release", n=1)
    await eve.told(8, left["version"])
    moments.append(time.monotonic())
    await eventually(lambda: passed(moments[2] + 1.0), "eve's cell runs on", 5)
    await eve.replica.send("release", n=1)
    moments.append(time.monotonic())

    async def published() -> bool:
        return sum(line.cells for line in await lines(client)) == 2

    await eventually(published, "the accounts stand in etcd", 15)
    used = {line.owner: line for line in await lines(client)}
    both = moments[2] - moments[1]
    assert abs(used["ann"].tpc_seconds - 4 * both) < 1
    assert abs(used["eve"].tpc_seconds + used["ann"].tpc_seconds - 8 * used["eve"].seconds) < 0.4, "all, all the time"
    assert abs(used["eve"].seconds - (moments[3] - moments[0])) < 0.5


async def test_a_slice_that_a_cell_touched_is_lent_to_like_any_and_gives_back(client: Etcd, host: MakeHost) -> None:
    a = host("a", **SITE)
    for owner in ("ann", "eve"):
        await create(client, kernel_spec(f"k-{owner}", "a", owner=owner))
    ann, eve = [Party(one, (await one.ready())["pid"]) for one in (a.replica("k-ann", 0), a.replica("k-eve", 0))]
    wants = {"gpus": 0, "tpcs": 8, "memory": 2 * GIB, "model": ""}
    begins = {"n": 1, "attempt": 1, "kind": "cell", "resources": {}, "wait": True, "applied": 0}
    lead = await eve.replica.send("bid", **begins, touch=wants, borrow=0)
    assert lead["grant"] is None
    touched = await eve.replica.send("touch", seconds=20.0, n=1, token=lead["token"], resources=wants, borrow=0)
    share = touched["grant"]["shares"][0]
    assert (len(share["tpcs"]), len(share["lent"])) == (8, 4)
    ann.ask(4)
    kept = await eve.gives(await eve.told(4))
    assert await ann.granted() == set(range(8)) - kept

    async def published() -> bool:
        return {g.owner: set(g.shares[0].tpcs) for g in await grants_of(client, "a")} == {
            "eve": kept,
            "ann": set(range(8)) - kept,
        }

    await eventually(published, "both stand in etcd", 10)
    again = await eve.replica.send("touch", n=1, token=lead["token"], resources=wants, borrow=0)
    assert set(again["grant"]["shares"][0]["tpcs"]) == kept, "asked again: the grant as it is now"


async def passed(moment: float) -> bool:
    return time.monotonic() >= moment


async def test_a_daemon_that_is_killed_in_the_middle_of_a_recall_asks_again(client: Etcd, host: MakeHost) -> None:
    a, ann, eve = await parties(client, host)
    ann.ask(4)
    before = await eve.told(4)
    a.kill()
    a.start()
    after = await eve.told(4, before["version"])
    await eve.gives(before)
    assert ann.waiting is not None
    await eve.replica.send("status")  # answered after what was said before it
    assert not ann.waiting.done(), "it was said of a slice of the daemon before"
    kept = await eve.gives(after)
    assert await ann.granted() == set(range(8)) - kept


async def test_a_borrower_that_is_killed_in_the_middle_of_a_recall_holds_up_nobody(
    client: Etcd, host: MakeHost
) -> None:
    _, ann, eve = await parties(client, host)
    ann.ask(4)
    await eve.told(4)
    os.kill(eve.pid, signal.SIGKILL)
    assert len(await ann.granted()) == 4


async def test_who_does_not_give_back_is_warned_interrupted_and_restarted(client: Etcd, host: MakeHost) -> None:
    _, ann, eve = await parties(client, host, Lending={"patience": 1, "within": 0.1})
    ann.ask(4)

    async def interrupted() -> bool:
        return [m["stage"] for m in await eve.replica.pushed("gpu_misuse")] == ["warn", "interrupt"]

    await eventually(interrupted, "it is warned, then interrupted", 10)
    assert "asked to give back the TPCs" in (await eve.replica.pushed("gpu_misuse"))[0]["text"]
    assert len(await ann.granted()) == 4


async def test_where_lending_is_off_a_cell_keeps_what_it_got(client: Etcd, host: MakeHost) -> None:
    a = host("a", **SITE, Lending={"enabled": False})
    await create(client, kernel_spec("k-eve", "a", owner="eve"))
    eve = Party(a.replica("k-eve", 0), (await a.replica("k-eve", 0).ready())["pid"])
    assert (await eve.bid(8, borrow=8))["grant"]["shares"][0]["lent"] == []
