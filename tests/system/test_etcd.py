"""The etcd client against a real etcd: watches and leases that outlive it, one winner, clear errors."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from nbos_cluster import election, keys, membership, records
from nbos_cluster import etcd as etcd_module
from nbos_cluster.etcd import (
    Changes,
    Etcd,
    EtcdError,
    EtcdUnavailable,
    Lease,
    LeaseGone,
    Snapshot,
    TLSFiles,
    exists,
    missing,
    mod_is,
    op_delete_prefix,
    op_delete_range,
    op_get,
    op_newest,
    op_put,
    value_is,
)
from nbos_cluster.records import ClaimRecord, Epoch, KernelSpec

from .etcdserver import EtcdServer, eventually


class Seen:
    """Follows a watch in a task and keeps what came, with the state that follows from it."""

    def __init__(self, client: Etcd, prefix: str, start: int | None = None) -> None:
        self.items: list[Snapshot | Changes] = []
        self.state: dict[str, bytes] = {}
        self.puts: list[tuple[str, bytes]] = []
        self._task = asyncio.create_task(self._follow(client.watch(prefix, start)))

    async def _follow(self, watch: AsyncIterator[Snapshot | Changes]) -> None:
        async for item in watch:
            if isinstance(item, Snapshot):
                self.state = {kv.key: kv.value for kv in item.kvs}
            else:
                self._apply(item)
            self.items.append(item)

    def _apply(self, changes: Changes) -> None:
        for event in changes.events:
            if event.kind == "put":
                self.state[event.kv.key] = event.kv.value
                self.puts.append((event.kv.key, event.kv.value))
            else:
                self.state.pop(event.kv.key, None)

    @property
    def snapshots(self) -> int:
        return sum(isinstance(item, Snapshot) for item in self.items)

    async def until(self, key: str, value: bytes | None) -> None:
        await eventually(lambda: bool(self.items) and self.state.get(key) == value, f"{key} is {value!r}")

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        assert self._task.cancelled(), self._task.exception()


async def test_reads_what_it_wrote(etcd: EtcdServer) -> None:
    async with etcd.client() as client:
        revision = await client.put("/a/1", b"one")
        await client.put("/a/2", b"two")
        await client.put("/b/1", b"other")
        found = await client.get("/a/1")
        assert found is not None
        assert (found.value, found.mod_revision, found.lease) == (b"one", revision, 0)
        kvs, _ = await client.range("/a/")
        assert [kv.key for kv in kvs] == ["/a/1", "/a/2"]
        assert await client.get("/a/3") is None
        assert await client.delete("/a/1")
        assert not await client.delete("/a/1")
        assert await client.delete_prefix("/a/") == 1


async def test_a_transaction_reads_in_both_branches(etcd: EtcdServer) -> None:
    async with etcd.client() as client:
        put = [op_put("/t/1", b"x"), op_put("/t/2", b"y")]
        won = await client.txn([missing("/t/1")], put, [op_get("/t/1")])
        assert won.succeeded
        assert list(won.responses) == [[], []]
        lost = await client.txn([missing("/t/1")], put, [op_get("/t/1"), op_newest("/t/"), op_get("/t/9")])
        assert not lost.succeeded
        assert [[kv.key for kv in found] for found in lost.responses] == [["/t/1"], ["/t/2"], []]
        assert lost.responses[0][0].mod_revision == won.revision
        true = [exists("/t/1"), mod_is("/t/1", won.revision), value_is("/t/1", b"x"), mod_is("/none", 0)]
        assert (await client.txn(true, [op_delete_range("/t/1", "/t/2")])).succeeded
        assert (await client.txn([], [op_delete_prefix("/t/")])).succeeded
        assert (await client.range("/t/"))[0] == []


async def test_tls_with_client_certificate(tls_etcd: EtcdServer) -> None:
    async with tls_etcd.client() as client:
        await client.put("/secret", b"x")
        assert (await client.status())["version"]


async def test_without_a_client_certificate_nothing_is_read(tls_etcd: EtcdServer, tmp_path: Path) -> None:
    async with Etcd([tls_etcd.endpoint], timeout=0.5) as client:
        with pytest.raises(EtcdUnavailable):
            await client.get("/secret")


async def test_a_certificate_of_another_authority_is_refused(tls_etcd: EtcdServer, tmp_path: Path) -> None:
    from nbos_cluster import certs

    assert tls_etcd.tls is not None
    certs.make_ca(tmp_path / "other")
    stranger = TLSFiles(tls_etcd.tls.ca, *certs.issue(tmp_path / "other", "client"))
    async with Etcd([tls_etcd.endpoint], stranger, timeout=0.5) as client:
        with pytest.raises(EtcdUnavailable):
            await client.get("/secret")


async def test_unavailable_says_where_and_since_when(etcd: EtcdServer) -> None:
    async with etcd.client(timeout=0.5) as client:
        await client.put("/x", b"1")
        etcd.stop()
        before = time.monotonic()
        with pytest.raises(EtcdUnavailable) as first:
            await client.get("/x")
        assert time.monotonic() - before < 2
        with pytest.raises(EtcdUnavailable) as second:
            await client.put("/x", b"2")
        assert etcd.endpoint in str(second.value)
        assert "does not answer since" in str(second.value)
        assert second.value.since == first.value.since == client.away_since
        etcd.start()
        await etcd.ready()
        assert await client.get("/x") is not None
        assert client.away_since is None


async def test_the_next_endpoint_is_used_when_one_is_away(etcd: EtcdServer) -> None:
    async with Etcd(["127.0.0.1:1", etcd.endpoint]) as client:
        await client.put("/x", b"1")
        assert client.member.endpoint == etcd.endpoint


async def test_a_lost_member_is_not_felt_and_a_lost_quorum_is_told(three_etcds: list[EtcdServer]) -> None:
    async with Etcd([server.endpoint for server in three_etcds]) as client:
        seen = Seen(client, "/w/")
        await client.put("/w/1", b"a")
        await seen.until("/w/1", b"a")
        lost = next(server for server in three_etcds if server.endpoint == client.member.endpoint)
        lost.stop()
        for i in range(50):
            await client.put("/w/1", b"%d" % i)
        await seen.until("/w/1", b"49")
        # A put whose answer died with the member is repeated, so it may be seen twice.
        values = [value for _, value in seen.puts if value != b"a"]
        assert list(dict.fromkeys(values)) == [b"%d" % i for i in range(50)]
        another = next(server for server in three_etcds if server is not lost)
        another.stop()
        with pytest.raises(EtcdUnavailable):
            await client.put("/w/1", b"no quorum")
        lost.start()

        async def accepted() -> bool:
            try:
                await client.put("/w/1", b"back")
            except EtcdUnavailable:
                return False
            return True

        await eventually(accepted, "writes go through with the quorum back")
        await seen.until("/w/1", b"back")
        await seen.end()


async def test_a_refusal_is_no_outage(etcd: EtcdServer) -> None:
    async with etcd.client() as client:
        with pytest.raises(EtcdError, match="too large"):
            await client.put("/x", b"x" * 1_800_000)
        with pytest.raises(LeaseGone):
            await client.put("/x", b"x", lease=12345)
        assert client.away_since is None


async def test_a_closed_client_says_so(etcd: EtcdServer) -> None:
    client = etcd.client()
    await client.connect()
    watch = client.watch("/w/")
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch))
    await client.put("/x", b"1")
    await client.close()
    with pytest.raises(EtcdUnavailable, match="closed"):
        await waiting
    with pytest.raises(EtcdUnavailable, match="closed"):
        await client.get("/x")


async def test_a_watch_gives_a_snapshot_then_changes(etcd: EtcdServer) -> None:
    async with etcd.client() as client:
        await client.put("/w/1", b"a")
        watch = client.watch("/w/")
        first = await anext(watch)
        assert isinstance(first, Snapshot)
        assert [kv.value for kv in first.kvs] == [b"a"]
        await client.txn([], [op_put("/w/2", b"b"), op_put("/w/3", b"c"), op_put("/v/1", b"no")])
        changes = await anext(watch)
        assert isinstance(changes, Changes)
        assert [event.kv.key for event in changes.events] == ["/w/2", "/w/3"]
        assert changes.revision == first.revision + 1


async def test_a_watch_resumes_after_etcd_was_killed(etcd: EtcdServer) -> None:
    async with etcd.client() as client, etcd.client() as writer:
        seen = Seen(client, "/w/")
        await writer.put("/w/0", b"0")
        await seen.until("/w/0", b"0")
        for round_ in range(1, 4):
            etcd.stop(signal.SIGKILL)
            etcd.start()
            await etcd.ready()
            for i in range(20):
                await writer.put(f"/w/{i}", b"%d" % round_)
            await seen.until("/w/19", b"%d" % round_)
        assert seen.snapshots == 1, "a resumed watch does not read anew"
        expected = [("/w/0", b"0"), *((f"/w/{i}", b"%d" % r) for r in (1, 2, 3) for i in range(20))]
        assert seen.puts[-len(expected) + 1 :] == expected[1:], "nothing skipped, nothing twice"
        await seen.end()


async def test_a_watch_resumes_within_a_second_of_etcd_being_back(etcd: EtcdServer) -> None:
    async with etcd.client() as client:
        seen = Seen(client, "/w/")
        await seen.until("/w/1", None)
        etcd.stop()
        gone = time.monotonic()
        await eventually(lambda: time.monotonic() - gone > 3, "the back-off has grown to its end")
        etcd.start()
        await etcd.ready()
        async with etcd.client() as writer:
            await writer.put("/w/1", b"x")
        back = time.monotonic()
        await seen.until("/w/1", b"x")
        assert time.monotonic() - back < 1.5
        await seen.end()


async def test_after_compaction_a_watch_reads_anew(etcd: EtcdServer) -> None:
    async with etcd.client() as writer:
        first = await writer.put("/w/gone", b"x")
        await writer.put("/w/1", b"a")
        await writer.delete("/w/gone")
        last = await writer.put("/w/1", b"b")
        await writer.compact(last)
        await writer.compact(last)
        seen = Seen(writer, "/w/", start=first)
        await seen.until("/w/1", b"b")
        assert seen.snapshots == 1
        assert seen.state == {"/w/1": b"b"}
        await writer.put("/w/1", b"c")
        await seen.until("/w/1", b"c")
        await seen.end()


async def test_an_etcd_that_lost_its_data_is_read_anew(etcd: EtcdServer) -> None:
    async with etcd.client() as client:
        for i in range(5):
            await client.put(f"/w/{i}", b"x")
        seen = Seen(client, "/w/")
        await seen.until("/w/4", b"x")
        etcd.stop()
        (etcd.directory / "data").rename(etcd.directory / "lost")
        etcd.start()
        await seen.until("/w/4", None)
        await client.put("/w/1", b"new")
        await seen.until("/w/1", b"new")
        await seen.end()


async def test_many_watches_share_the_connection(etcd: EtcdServer) -> None:
    async with etcd.client() as client:
        watches = [Seen(client, f"/w/{i}/") for i in range(150)]
        await client.put("/w/149/x", b"1")
        await watches[149].until("/w/149/x", b"1")
        for seen in watches:
            await seen.end()


async def test_an_idle_client_is_not_thrown_out(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # etcd ends a connection after three pings without a call under way; at this pace, within four seconds.
    monkeypatch.setitem(etcd_module._OPTIONS, "grpc.keepalive_time_ms", 1000)
    async with etcd.client() as client:
        await client.put("/idle", b"1")
        channel = client.member.channel
        left = asyncio.ensure_future(channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        await asyncio.wait({left}, timeout=6)
        assert not left.done(), f"etcd closed the connection: {channel.get_state()}"
        left.cancel()


async def test_a_lease_lives_until_it_is_stopped(etcd: EtcdServer) -> None:
    told: list[int] = []

    async def on_new(lease_id: int) -> None:
        told.append(lease_id)
        await client.put("/l/1", b"x", lease=lease_id)

    async with etcd.client() as client:
        lease = Lease(client, ttl=2, on_new=on_new)
        await lease.start()
        assert await client.lease_alive(lease.id) > 0
        born = time.monotonic()
        await eventually(lambda: time.monotonic() - born > 4, "two lifetimes have passed")
        assert await client.get("/l/1") is not None
        assert lease.sure
        await lease.stop()
        assert await client.get("/l/1") is None
        assert await client.lease_alive(lease.id) <= 0
        assert told == [lease.id]


async def test_a_lost_lease_is_granted_again(etcd: EtcdServer) -> None:
    told: list[int] = []

    async def on_new(lease_id: int) -> None:
        told.append(lease_id)
        if len(told) == 2:
            raise EtcdUnavailable("a test", time.time(), "on_new is told again when it fails")

    async with etcd.client() as client:
        lease = Lease(client, ttl=2, on_new=on_new)
        await lease.start()
        await client.lease_revoke(lease.id)
        await eventually(lambda: len(told) == 3, "the owner is told until it succeeds")
        assert told[1] == told[2] == lease.id != told[0]
        await lease.stop()


async def test_a_lease_outlives_an_outage_and_its_process(etcd: EtcdServer) -> None:
    told: list[int] = []

    async def on_new(lease_id: int) -> None:
        told.append(lease_id)

    async with etcd.client(timeout=0.5) as client:
        lease = Lease(client, ttl=3, on_new=on_new)
        await lease.start()
        etcd.stop()
        gone = time.monotonic()
        await eventually(lambda: time.monotonic() - gone > 5, "etcd is away for longer than the ttl")
        assert not lease.sure
        etcd.start()
        await eventually(lambda: lease.sure, "the lease is kept alive again")
        assert told == [lease.id]
        await lease.stop(revoke=False)
        again = Lease(client, ttl=3, lease_id=lease.id, on_new=on_new)
        await again.start()
        assert again.id == lease.id
        assert len(told) == 1
        await again.stop()


async def test_of_twenty_claimers_one_wins(etcd: EtcdServer) -> None:
    spec = KernelSpec(kernel="k", owner="ada", replicas=3, placement={"0": "h"}, key="s", curve_publickey="p",
                      curve_secretkey="c")  # fmt: skip
    async with etcd.client() as client:
        assert (await client.commit(membership.create(spec))).succeeded
        lease = await client.lease_grant(10)

        async def bid(i: int) -> election.Won | election.Lost:
            async with etcd.client() as own:
                mine = ClaimRecord(n=1, replica=i, host=f"host-{i}")
                epoch = Epoch(epoch=1, incarnation=1)
                txn = election.claim("k", 1, epoch=epoch, claim=mine, lease=lease)
                return election.classify(1, await own.commit(txn), mine)

        outcomes = await asyncio.gather(*(bid(i) for i in range(20)))
        won = [(i, o) for i, o in enumerate(outcomes) if isinstance(o, election.Won)]
        assert len(won) == 1
        held = await client.get(keys.claim("k", 1))
        assert held is not None
        assert records.decode(held.value, ClaimRecord).replica == won[0][0]
        assert held.mod_revision == won[0][1].token
        assert {o.code for o in outcomes if isinstance(o, election.Lost)} == {"taken"}
