"""What breaks around a claim: daemons that crash or are cut off, etcd away, memory, crash loops, shutting down."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from nbos_cluster import membership
from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import create, grants_of, kernel_spec, view_of
from tests.system.etcdserver import EtcdServer, eventually


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_daemon_killed_and_restarted_finds_its_replica_claim_and_grant_again(
    client: Etcd, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    await create(client, kernel_spec("other", "a", owner="bob"))
    replica, other = a.replica("k", 0), a.replica("other", 0)
    before = await replica.ready()
    await other.ready()
    lead = await replica.bid(1, gpus=2)
    a.kill()
    a.start()
    after = await replica.ready()
    assert after["pid"] == before["pid"]
    await other.ready()
    assert (await other.bid(1, tpcs=1))["code"] == "busy"
    assert [g.kernel for g in await grants_of(client, "a")] == ["k"]
    assert (await replica.append(1, lead["token"]))["ok"]
    assert (await other.bid(1, tpcs=1))["answer"] == "lead"
    assert len(await grants_of(client, "a")) == 1


async def test_an_answer_lost_with_the_daemon_is_given_again(client: Etcd, host: MakeHost) -> None:
    a = host("a", lease_ttl=20)
    await create(client, kernel_spec("k", "a"))
    await create(client, kernel_spec("other", "a"))
    replica, other = a.replica("k", 0), a.replica("other", 0)
    await replica.ready()
    await other.ready()
    lead = await replica.bid(1, gpus=1)
    await replica.order(hello={"running": None})
    a.kill()
    a.start()
    await replica.ready()
    again = await replica.bid(1, gpus=1)
    assert (again["answer"], again["token"], again["grant"]) == ("lead", lead["token"], lead["grant"])
    assert (await replica.append(1, lead["token"]))["ok"]
    assert (await replica.append(1, lead["token"]))["ok"]
    await replica.order(drop=True)
    await replica.ready()
    assert (await replica.append(1, lead["token"]))["ok"]


async def test_a_replica_that_died_while_its_daemon_was_away_is_abandoned(client: Etcd, host: MakeHost) -> None:
    a = host("a", lease_ttl=20)
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    pid = (await replica.ready())["pid"]
    await replica.bid(1, gpus=1)
    a.kill()
    os.kill(pid, signal.SIGKILL)
    a.start()
    state = await replica.ready(applied=1)
    assert state["pid"] != pid
    assert "away" in (await view_of(client, "k")).log[1].reason

    async def no_grants() -> bool:
        return await grants_of(client, "a") == []

    await eventually(no_grants, "the grant is gone")
    assert (await replica.bid(2, gpus=2))["answer"] == "lead"


async def test_a_cut_off_executor_is_fenced_when_another_took_its_execution(client: Etcd, host: MakeHost) -> None:
    a, b = host("a"), host("b")
    await create(client, kernel_spec("k", "a", "b"))
    first, second = a.replica("k", 0), b.replica("k", 1)
    pid = (await first.ready())["pid"]
    await second.ready()
    lead = await first.bid(1, gpus=2)
    assert a.process is not None
    a.process.send_signal(signal.SIGSTOP)

    async def claimed() -> bool:
        return bool((await second.bid(1))["answer"] == "lead")

    await eventually(claimed, "the claim ends with the lease", 15)
    a.process.send_signal(signal.SIGCONT)
    await eventually(lambda: not alive(pid), "the fenced process ends", 8)
    assert lead["token"]
    held = (await view_of(client, "k")).claim_of(1)
    assert held is not None
    assert held.record.host == "b"
    assert (await second.append(1, held.token))["ok"]
    await first.ready(applied=1)
    assert (await first.bid(2, gpus=2))["answer"] == "lead"


async def test_a_claim_whose_lease_was_lost_is_renewed_when_nobody_took_it(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    lead = await replica.bid(1, gpus=1)
    assert a.process is not None
    a.process.send_signal(signal.SIGSTOP)

    async def gone() -> bool:
        return (await view_of(client, "k")).claims == {}

    await eventually(gone, "the claim ends with the lease", 15)
    a.process.send_signal(signal.SIGCONT)

    async def renewed() -> bool:
        return bool(await replica.pushed("token"))

    await eventually(renewed, "a new token", 10)
    token = (await replica.pushed("token"))[0]["token"]
    assert token > lead["token"]
    assert len(await grants_of(client, "a")) == 1
    assert (await replica.append(1, token))["ok"]


async def test_a_claim_lost_while_its_daemon_was_dead_is_renewed_when_the_replica_reports_it(
    client: Etcd, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    pid = (await replica.ready())["pid"]
    lead = await replica.bid(1, gpus=1)
    a.kill()

    async def gone() -> bool:
        return (await view_of(client, "k")).claims == {}

    await eventually(gone, "the claim ends with the lease", 15)
    a.start()
    assert (await replica.ready())["pid"] == pid
    assert [g.grant for g in await grants_of(client, "a")] == [lead["grant"]["grant"]]
    assert (await replica.append(1, lead["token"]))["ok"], "an old token of the same claim is understood"
    assert await grants_of(client, "a") == []
    assert (await replica.bid(2, gpus=2))["answer"] == "lead"


async def test_without_etcd_bids_say_so_and_an_append_waits_until_it_is_back(
    etcd: EtcdServer, client: Etcd, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    await create(client, kernel_spec("other", "a"))
    replica, other = a.replica("k", 0), a.replica("other", 0)
    await replica.ready()
    pid = (await other.ready())["pid"]
    token = (await replica.bid(1))["token"]
    etcd.stop()
    append = asyncio.create_task(replica.append(1, token))
    refused = await other.bid(1)
    assert refused["code"] == "unavailable"
    assert "away since" in refused["reason"]
    waiting = asyncio.create_task(other.bid(1, wait=True, seconds=40))

    async def told() -> bool:
        return bool(await other.pushed("waiting"))

    await eventually(told, "told why it waits", 10)
    assert not append.done()
    etcd.start()
    assert (await append)["ok"]
    assert (await waiting)["answer"] == "lead"
    assert (await other.ready())["pid"] == pid


async def test_whoever_waits_for_an_entry_that_cannot_be_stored_is_told_that_etcd_is_away(
    etcd: EtcdServer, client: Etcd, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    token = (await replica.bid(1))["token"]
    with etcd.paused():
        append = asyncio.create_task(replica.append(1, token, 40))

        async def told() -> bool:
            said = await replica.pushed("waiting")
            return bool(said) and said[-1]["n"] == 2 and "not stored yet: etcd is away since" in said[-1]["reason"]

        await eventually(told, "told about execution 2, soon", 2.5)
        assert (await replica.pushed("waiting"))[-1]["position"] is None
        assert not append.done()
    assert (await append)["ok"]


async def test_an_etcd_that_stood_still_past_every_lease_costs_no_execution(
    etcd: EtcdServer, client: Etcd, host: MakeHost
) -> None:
    a, b = host("a"), host("b")
    await create(client, kernel_spec("k", "a", "b"))
    first, second = a.replica("k", 0), b.replica("k", 1)
    await first.ready()
    await second.ready()
    token = (await first.bid(1))["token"]
    with etcd.paused():
        append = asyncio.create_task(first.append(1, token, 40))
        stopped = time.monotonic()
        await eventually(lambda: time.monotonic() - stopped > 7, "every lease is over")
        # What the router asks when the executor's record has gone.
        outcome = asyncio.create_task(second.send("outcome", n=1, abandon=True))
    asked = [await outcome, *[await second.send("outcome", n=1, abandon=True) for _ in range(3)]]
    assert "abandoned" not in [answer["state"] for answer in asked]
    assert (await append)["ok"]
    assert (await view_of(client, "k")).log[1].kind == "cell"
    for replica in (first, second):
        states = [[m["state"] for m in pushed["members"]] for pushed in await replica.pushed("members")]
        ready = states.index(["ready", "ready"])
        assert not any("lost" in told for told in states[ready:]), "nobody is called lost who is well"


async def test_a_bid_that_etcd_does_not_answer_is_told_why_it_waits(
    etcd: EtcdServer, client: Etcd, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    with etcd.paused():
        bid = asyncio.create_task(replica.bid(1, wait=True, seconds=40))

        async def told() -> bool:
            return any("etcd is away since" in m["reason"] for m in await replica.pushed("waiting"))

        await eventually(told, "told why, soon", 2.5)
    assert (await bid)["answer"] == "lead"


async def test_a_replica_over_its_memory_limit_is_ended_with_the_amounts(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a", memory_limit=200 << 20))
    replica = a.replica("k", 0)
    await replica.ready()
    await replica.bid(1)
    await replica.order(eat=300 << 20)
    await replica.ready(applied=1)
    assert "of 0.20 GiB memory" in (await view_of(client, "k")).log[1].reason


async def test_a_replica_that_keeps_dying_is_reported_failed_with_the_reason(client: Etcd, host: MakeHost) -> None:
    host("a", replica_command=["/bin/false"])
    await create(client, kernel_spec("k", "a"))

    async def failed() -> bool:
        record = (await view_of(client, "k")).replicas.get(0)
        return record is not None and record.state == "failed" and "exit status 1" in record.reason

    await eventually(failed, "the replica's record says failed", 15)


async def test_sigterm_ends_all_replicas_and_gives_the_lease_back(client: Etcd, host: MakeHost) -> None:
    a = host("a", lease_ttl=60)
    await create(client, kernel_spec("k", "a"))
    pid = (await a.replica("k", 0).ready())["pid"]
    await a.replica("k", 0).bid(1)
    start = time.monotonic()
    assert a.kill(signal.SIGTERM) == 0
    assert time.monotonic() - start < 3
    assert not alive(pid)
    view = await view_of(client, "k")
    assert (view.replicas, view.claims, view.last) == ({}, {}, 0)
    assert (await client.range("/nbos/v1/hosts/"))[0] == []


async def test_a_full_host_says_so_and_takes_the_replica_when_there_is_room(client: Etcd, host: MakeHost) -> None:
    a = host("a", max_replicas=1)
    await create(client, kernel_spec("k", "a"))
    await a.replica("k", 0).ready()
    await create(client, kernel_spec("second", "a"))

    async def refused() -> bool:
        record = (await view_of(client, "second")).replicas.get(0)
        return record is not None and record.state == "failed" and "its limit" in record.reason

    await eventually(refused, "the record says that the host is full", 5)
    await client.commit(membership.delete("k"))
    await a.replica("second", 0).ready()
