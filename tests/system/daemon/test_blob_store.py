"""What a blob store can do to a kernel, provoked for real: full, damaged, missing, away, slow; and the collection."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_daemon.blobs import folder_of, open_store
from gpu_daemon.directory_store import DirectoryStore
from nbos_cluster import membership
from nbos_cluster.content import address
from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.s3server import S3Server
from tests.system.daemon.site import Replica, create, kernel_spec, view_of
from tests.system.etcdserver import eventually

ONE = os.urandom(100_000)
TWO = os.urandom(100_000)
MEBIBYTE = 1 << 20


@pytest.fixture
def s3() -> Iterator[S3Server]:
    server = S3Server().start()
    yield server
    server.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 4 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def component(name: str, *blobs: bytes) -> dict[str, Any]:
    frame = {"size": sum(map(len, blobs)), "blobs": [address(blob) for blob in blobs]}
    return {"names": [name], "digest": "d", "frames": [frame]}


async def put(replica: Replica, data: bytes) -> Any:
    return await replica.send("put_blob", data, hash=address(data), seconds=60)


async def get(replica: Replica, data: bytes) -> Any:
    return await replica.send("get_blob", hash=address(data), seconds=60)


async def ready(client: Etcd, host: MakeHost, name: str = "a", **config: Any) -> Replica:
    a = host(name, **config)
    await create(client, kernel_spec("k", name))
    replica = a.replica("k", 0)
    await replica.ready()
    return replica


def file_of(root: Path, data: bytes) -> Path:
    return root / folder_of("ann") / address(data)


# -- failures ---------------------------------------------------------------------------------------------------------


async def test_a_full_disk_is_told_as_that_and_what_was_stored_stays(
    client: Etcd, host: MakeHost, small_disk: Path
) -> None:
    replica = await ready(client, host, blob_store=f"file://{small_disk}")
    first, second = os.urandom(3 * MEBIBYTE), os.urandom(3 * MEBIBYTE)
    assert (await put(replica, first))["ok"]
    refused = await put(replica, second)
    assert refused["error"] == "full"
    assert "is full" in refused["reason"]
    assert "free of 4.2 MB" in refused["reason"]
    assert bytes.fromhex((await get(replica, first))["payload"]) == first
    assert not [name for name in os.listdir(small_disk / folder_of("ann")) if name.startswith(".new-")]
    token = (await replica.bid(1))["token"]
    lost = {"y": refused["reason"]}
    assert (await replica.append(1, token, components=[component("x", first)], lost=lost))["ok"]
    file_of(small_disk, first).unlink()
    assert (await put(replica, second))["ok"]


async def test_a_flipped_bit_is_found_set_aside_and_can_be_put_right(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    replica = await ready(client, host)
    assert (await put(replica, ONE))["ok"]
    assert (await put(replica, TWO))["ok"]
    path = file_of(tmp_path / "blobs", ONE)
    content = bytearray(path.read_bytes())
    content[5000] ^= 4
    path.write_bytes(content)
    answer = await get(replica, ONE)
    assert answer["error"] == "corrupt"
    assert "another hash" in answer["reason"]
    assert not path.exists()
    assert path.with_name(path.name + ".corrupt").exists()
    assert (await get(replica, TWO))["ok"]
    assert (await get(replica, ONE))["error"] == "missing"
    assert (await put(replica, ONE))["ok"]
    assert bytes.fromhex((await get(replica, ONE))["payload"]) == ONE


async def test_putting_a_value_again_heals_a_blob_that_was_damaged_unseen(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    replica = await ready(client, host)
    assert (await put(replica, ONE))["ok"]
    path = file_of(tmp_path / "blobs", ONE)
    path.write_bytes(ONE[:-1] + bytes([ONE[-1] ^ 1]))
    assert (await put(replica, ONE))["ok"]
    assert bytes.fromhex((await get(replica, ONE))["payload"]) == ONE


async def test_an_entry_that_names_a_missing_blob_is_not_appended_until_it_is_there(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    replica = await ready(client, host)
    assert (await put(replica, ONE))["ok"]
    token = (await replica.bid(1))["token"]
    entry = {"components": [component("x", ONE, TWO)]}
    refused = await replica.append(1, token, **entry)
    assert (refused["error"], refused["missing"]) == ("blobs_missing", [address(TWO)])
    assert (await get(replica, TWO))["error"] == "missing"
    assert (await put(replica, TWO))["ok"]
    assert (await replica.send("have_blobs", hashes=[address(ONE), address(b"no")]))["have"] == [address(ONE)]
    assert (await replica.append(1, token, **entry))["ok"]
    assert (await view_of(client, "k")).last == 1


async def test_a_stopped_s3_server_is_away_and_holds_up_nothing_else(
    client: Etcd, host: MakeHost, s3: S3Server
) -> None:
    replica = await ready(client, host, blob_store="s3://bucket/nbos", blob_store_options=s3.options)
    assert (await put(replica, ONE))["ok"]
    assert bytes.fromhex((await get(replica, ONE))["payload"]) == ONE
    assert (await get(replica, TWO))["error"] == "missing"
    token = (await replica.bid(1))["token"]
    s3.stop()
    waiting = [asyncio.create_task(put(replica, TWO)), asyncio.create_task(get(replica, ONE))]
    start = time.monotonic()
    assert (await replica.send("status"))["ok"]
    assert time.monotonic() - start < 1
    for answer in await asyncio.gather(*waiting):
        assert answer["error"] == "away"
        assert "s3://bucket/nbos does not answer" in answer["reason"]
    refused = await replica.append(1, token, components=[component("x", ONE)])
    assert refused["error"] == "away"
    assert (await replica.append(1, token, lost={"x": refused["reason"]}))["ok"], (
        "the kernel goes on with what is sound"
    )
    s3.start()
    assert (await put(replica, ONE))["ok"]
    token = (await replica.bid(2))["token"]
    assert (await replica.append(2, token, components=[component("x", ONE)]))["ok"]


async def test_a_damaged_object_in_s3_is_corrupt(client: Etcd, host: MakeHost, s3: S3Server) -> None:
    replica = await ready(client, host, blob_store="s3://bucket/nbos", blob_store_options=s3.options)
    assert (await put(replica, ONE))["ok"]
    s3.flip_a_bit("nbos", f"{folder_of('ann')}/{address(ONE)}")
    assert (await get(replica, ONE))["error"] == "corrupt"
    assert (await get(replica, ONE))["error"] == "missing"
    assert (await put(replica, ONE))["ok"]
    assert (await get(replica, ONE))["ok"]


async def test_a_store_that_hangs_is_away_after_the_configured_time(client: Etcd, host: MakeHost, s3: S3Server) -> None:
    replica = await ready(client, host, blob_store="s3://bucket/nbos", blob_store_options=s3.options, blob_patience=1.5)
    assert (await put(replica, ONE))["ok"]
    s3.signal(signal.SIGSTOP)
    start = time.monotonic()
    answer = await get(replica, ONE)
    assert time.monotonic() - start < 10
    assert answer["error"] == "away"
    assert "has not answered" in answer["reason"]
    assert (await replica.bid(1))["answer"] == "lead"
    s3.signal(signal.SIGCONT)

    async def back() -> bool:
        return bool((await get(replica, ONE))["ok"])

    await eventually(back, "the store answers again", 40)


# -- shared memory ----------------------------------------------------------------------------------------------------


async def test_blobs_go_through_memory_shared_with_the_daemon(client: Etcd, host: MakeHost) -> None:
    replica = await ready(client, host)
    assert (await replica.send("put_blob", hash=address(ONE), at=0, size=len(ONE)))["error"] == "no_arena"
    size = await replica.order(arena=True)
    await replica.order(write=ONE.hex(), at=4096)
    assert (await replica.send("put_blob", hash=address(ONE), at=4096, size=len(ONE)))["ok"]
    answer = await replica.send("get_blob", hash=address(ONE), at=MEBIBYTE, room=len(ONE))
    assert (answer["size"], answer["payload"]) == (len(ONE), "")
    assert bytes.fromhex(await replica.order(read=len(ONE), at=MEBIBYTE)) == ONE
    outside = await replica.send("put_blob", hash=address(ONE), at=size - 10, size=100)
    assert outside["error"] == "malformed"
    small = await replica.send("get_blob", hash=address(ONE), at=0, room=10)
    assert small["error"] == "refused"
    other = await replica.send("put_blob", hash=address(TWO), at=4096, size=len(ONE))
    assert other["error"] == "refused"
    assert (await get(replica, TWO))["error"] == "missing"


async def test_blobs_are_read_from_the_daemons_own_files(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    replica = await ready(client, host)
    assert (await replica.ready())["hello"]["blobs"]["files"]
    assert (await put(replica, ONE))["ok"]
    DirectoryStore(tmp_path / "blobs").put("bob", address(TWO), TWO)
    assert await replica.order(files=[address(TWO), address(ONE)]) == [None, ONE.hex()]
    file_of(tmp_path / "blobs", ONE).rename(file_of(tmp_path / "blobs", ONE).with_suffix(".old"))
    assert await replica.order(files=[address(ONE)]) == [ONE.hex()]  # a collection had set it aside


async def test_what_is_put_without_an_address_is_stored_under_its_own(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    replica = await ready(client, host)
    assert (await replica.send("put_blob", ONE))["hash"] == address(ONE)
    await replica.order(arena=True)
    await replica.order(write=TWO.hex(), at=0)
    assert (await replica.send("put_blob", at=0, size=len(TWO)))["hash"] == address(TWO)
    assert [file_of(tmp_path / "blobs", data).read_bytes() for data in (ONE, TWO)] == [ONE, TWO]
    assert (await replica.send("put_blob", TWO, hash=""))["error"] == "refused"
    token = (await replica.bid(1))["token"]
    assert (await replica.append(1, token, components=[component("x", ONE, TWO)]))["ok"]


async def test_many_large_blobs_at_once_through_the_socket_do_not_break_the_connection(
    client: Etcd, host: MakeHost
) -> None:
    replica = await ready(client, host)
    large = [os.urandom(8 * MEBIBYTE) for _ in range(2)]
    for data in large:
        assert (await put(replica, data))["ok"]
    answers = await asyncio.gather(*(get(replica, large[i % 2]) for i in range(8)))
    assert [answer["size"] for answer in answers] == [8 * MEBIBYTE] * 8
    assert (await replica.ready())["hellos"] == 1


async def test_after_a_restart_of_the_daemon_shared_memory_is_asked_for_anew(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    await replica.order(arena=True)
    await replica.order(write=ONE.hex(), at=0)
    a.kill()
    a.start()
    await replica.ready()
    put_it = {"hash": address(ONE), "at": 0, "size": len(ONE)}
    assert (await replica.send("put_blob", **put_it))["error"] == "no_arena"
    await replica.order(arena=True)
    await replica.order(write=ONE.hex(), at=0)
    assert (await replica.send("put_blob", **put_it))["ok"]


# -- collection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "s3"])
async def test_blobs_that_no_log_names_are_set_aside_and_later_deleted(
    client: Etcd, host: MakeHost, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url, options = f"file://{tmp_path}/blobs", {}
    if kind == "s3":
        url, options = "s3://bucket/nbos", request.getfixturevalue("s3").options
    config = {"blob_store": url, "blob_store_options": options, "blob_grace": 2.0, "collect_every": 0.4}
    replica = await ready(client, host, **config)
    host("b", **config)
    store = open_store(url, options)

    async def held() -> set[tuple[str, bool]]:
        found = await asyncio.to_thread(lambda: list(store.contents(folder_of("ann"))))
        return {(item.address, item.condemned) for item in found}

    async def becomes(what: str, *blobs: bytes) -> None:
        async def so() -> bool:
            return await held() == {(address(blob), False) for blob in blobs}

        await eventually(so, what, 30)

    three = os.urandom(5000)
    for data in (ONE, TWO, three):
        assert (await put(replica, data))["ok"]
    token = (await replica.bid(1))["token"]
    assert (await replica.append(1, token, components=[component("x", ONE)]))["ok"]

    async def aside() -> bool:
        return (address(TWO), True) in await held()

    await eventually(aside, "a blob that nothing names is set aside")
    # Wanted after all: it comes back by itself.
    token = (await replica.bid(2))["token"]
    assert (await replica.append(2, token, components=[component("y", TWO)]))["ok"]
    await becomes("the third is deleted", ONE, TWO)
    await client.commit(membership.delete("k"))
    await becomes("a deleted kernel's blobs go")


async def test_nothing_is_collected_in_a_store_of_another_cluster(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    store, config = DirectoryStore(tmp_path / "blobs"), {"blob_grace": 1.0, "collect_every": 0.3}
    assert store.identity("another") == "another"
    store.put("ann", address(ONE), ONE)
    long_ago = time.time() - 3600
    os.utime(file_of(store.root, ONE), (long_ago, long_ago))
    for name in ("a", "b"):
        log = host(name, **config).log
        await eventually(lambda log=log: "another cluster" in log.read_text(), "the daemon says so")  # type: ignore[misc]
    assert [item.condemned for item in store.contents(folder_of("ann"))] == [False]
