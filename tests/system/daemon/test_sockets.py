"""What comes through a replica's socket: broken frames, others' blobs, somebody else's process; the daemon lives."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import struct

from nbos_cluster import wire
from nbos_cluster.content import address
from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import create, kernel_spec, view_of
from tests.system.etcdserver import eventually


async def test_requests_that_make_no_sense_are_refused_each_with_its_reason(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    unknown = await replica.send("format_disk")
    assert (unknown["ok"], unknown["error"]) == (False, "unknown")
    for message in (
        {"type": "bid", "n": -1, "applied": 0},
        {"type": "bid", "n": 1, "applied": 0, "resources": {"gpus": "all"}},
        {"type": "bid", "n": 1, "applied": 0, "resources": [1]},
        {"type": "append", "entry": 7, "token": 1},
        {"type": "append", "entry": {"n": 1, "kind": "origin"}, "token": 1},
        {"type": "applied", "n": "x"},
        {"type": "cancel"},
        {"type": "put_blob", "hash": ["x"]},
    ):
        answer = await replica.order(send=message)
        assert (answer["ok"], answer["error"]) == (False, "malformed"), message
    assert (await replica.append(1, 5))["error"] == "fenced"
    token = (await replica.bid(1))["token"]
    assert (await replica.append(1, token + 1))["error"] == "fenced"


async def test_broken_and_oversized_frames_close_that_connection_only(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    await create(client, kernel_spec("other", "a"))
    replica, other = a.replica("k", 0), a.replica("other", 0)
    await replica.ready()
    pid = (await other.ready())["pid"]
    no_json = b"this is not json"
    for raw in (
        struct.pack("!II", 1 << 31, 0),
        struct.pack("!II", 2, 1 << 31),
        struct.pack("!II", len(no_json), 0) + no_json,
        struct.pack("!II", 2, 0) + b"[]",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        before, hellos = len(await replica.pushed("error")), (await replica.ready())["hellos"]
        await replica.order(raw=raw.hex())

        async def connected_again(count: int = hellos) -> bool:
            return bool((await replica.order())["hellos"] > count)

        await eventually(connected_again, f"a new connection after {raw[:20]!r}", 5)
        assert len(await replica.pushed("error")) == before + 1
    assert (await other.ready())["pid"] == pid
    assert (await replica.bid(1))["answer"] == "lead"


async def test_another_process_cannot_use_a_replicas_socket(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    await a.replica("k", 0).ready()
    path = a.folder("k", 0) / "s"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(path.parent / "connection.json").st_mode) == 0o600
    reader, writer = await asyncio.open_unix_connection(str(path))
    hello = {"type": "hello", "id": 1, "pid": os.getpid(), "applied": -1, "running": None}
    writer.writelines(wire.pack(hello))
    answer, _ = await wire.read(reader)
    assert (answer["ok"], answer["error"]) == (False, "refused")
    assert await reader.read() == b""
    writer.close()
    assert (await a.replica("k", 0).bid(1))["answer"] == "lead"


async def test_blobs_are_kept_checked_and_out_of_other_users_reach(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a", owner="ann"))
    await create(client, kernel_spec("mine", "a", owner="ann"))
    await create(client, kernel_spec("other", "a", owner="bob"))
    replica, mine, other = (a.replica(k, 0) for k in ("k", "mine", "other"))
    for one in (replica, mine, other):
        await one.ready()
    data = os.urandom(100_000)
    digest = address(data)
    assert (await replica.send("put_blob", data, hash=digest))["ok"]
    assert bytes.fromhex((await mine.send("get_blob", hash=digest))["payload"]) == data
    assert (await other.send("get_blob", hash=digest))["error"] == "missing"
    assert (await other.send("put_blob", b"not that", hash=digest))["error"] == "refused"
    assert (await replica.send("get_blob", hash="../../etc/passwd"))["error"] == "refused"


async def test_a_replica_sees_none_of_the_daemons_environment_but_the_listed(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a", env={"MINE": "yes"}, cwd="/tmp"))
    state = await a.replica("k", 0).ready()
    assert state["environ"]["MINE"] == "yes"
    assert "DAEMON_SECRET" not in state["environ"]
    assert state["cwd"] == "/tmp"
    connection = json.loads((a.folder("k", 0) / "connection.json").read_text())
    assert (connection["key"], connection["curve_publickey"]) == ("key", "p" * 40)


async def test_a_replica_with_another_python_is_refused_and_told_why(client: Etcd, host: MakeHost) -> None:
    a, b = host("a"), host("b")
    await create(client, kernel_spec("k", "a", "b"))
    first, second = a.replica("k", 0), b.replica("k", 1)
    await first.ready()
    await second.ready()

    async def says(index: int, part: str) -> bool:
        record = (await view_of(client, "k")).replicas.get(index)
        return record is not None and part in (record.python, record.reason[: len(part)])

    await first.order(hello={"python": "3.11.2"}, drop=True)
    await eventually(lambda: says(0, "3.11.2"), "the first one's Python is known")
    await second.order(hello={"python": "3.12.1"}, drop=True)
    await eventually(
        lambda: says(1, "replica 1 has Python 3.12.1, replica 0 on host a has Python 3.11.2"), "it is told"
    )


async def test_a_replica_of_another_format_is_refused_with_both_versions_and_the_way_out(
    client: Etcd, host: MakeHost
) -> None:
    """An image from before formats were told counts as format 1; a newer one waits for newer daemons."""
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    only = a.replica("k", 0)
    assert (await only.ready())["hello"]["ok"]
    await only.order(hello={"format": wire.FORMAT + 1, "nbos": "9.9"}, drop=True)

    async def told() -> bool:
        record = (await view_of(client, "k")).replicas.get(0)
        return record is not None and all(
            part in record.reason
            for part in (
                "nbos 9.9",
                f"format {wire.FORMAT + 1}",
                f"takes {wire.OLDEST} to {wire.FORMAT}",
                "upgrade the daemons",
            )
        )

    await eventually(told, "its record says why it was ended")
