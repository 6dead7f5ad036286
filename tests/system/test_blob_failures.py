"""What a blob store can do to a notebook, for real: a file system that is full, files that are gone, bits that flipped,
an S3 server that is away. Each is told in the cell and in `%nbos state` as what it is, the kernel goes on with what is
sound, and what the store lacked is replicated as soon as that is possible. (A disk that cannot read: test_broken_disk.)
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from gpu_daemon.blobs import folder_of
from tests.system.channels import Result
from tests.system.cluster import Cluster, Notebook
from tests.system.daemon.s3server import S3Server
from tests.system.hubclient import eventually

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

ROOM = 64
"""MiB of the small file system."""


def mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"only root can mount a file system: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this cluster's blobs are: a file system of its own."""
    state = tmp_path_factory.mktemp("blob-failures") / "state"
    state.mkdir(mode=0o700)
    blobs = state / "blobs"
    blobs.mkdir(mode=0o700)
    mount("-t", "tmpfs", "-o", f"size={ROOM}m,mode=700", "none", blobs)
    yield blobs
    subprocess.run(["umount", "-l", blobs], check=True)


@pytest.fixture(scope="module")
def cluster(disk: Path) -> Iterator[Cluster]:
    cluster = Cluster(disk.parent)
    cluster.start()
    yield cluster
    assert cluster.stop() == []


@pytest_asyncio.fixture(loop_scope="module")
async def notebook(cluster: Cluster) -> AsyncIterator[Notebook]:
    notebook = await Notebook.open(cluster, "ada")
    await notebook.run("import os, hashlib; small = [1]")
    yield notebook
    await notebook.close()


async def fails_over(notebook: Notebook) -> None:
    """The executor is killed when the others have all there is."""
    await notebook.settled()
    os.kill((await notebook.executor()).pid, signal.SIGKILL)


async def from_the_log(notebook: Notebook) -> None:
    """All replicas are killed: everything has to be read from the store."""
    for replica in await notebook.settled():
        os.kill(replica.pid, signal.SIGKILL)


async def told(notebook: Notebook, name: str, *words: str) -> None:
    """`%nbos state` says of the variable that it is not replicated, and why."""
    result = await notebook.channels.execute("%nbos state")
    state = "\n".join(
        str(output.content["data"]["text/plain"]) for output in result.outputs if "data" in output.content
    )
    lines = [line for line in state.splitlines() if name in line and "not replicated" in line]
    assert len(lines) == 1, state
    assert all(word in lines[0] for word in words), lines


async def replicated(notebook: Notebook, name: str) -> None:
    async def nothing_lost() -> bool:
        return name not in (await notebook.model())["lost"]

    await eventually(nothing_lost, f"{name} is replicated", 20)


async def enlarge(disk: Path, times: int) -> None:
    command = ["mount", "-o", f"remount,size={ROOM * times}m", str(disk)]
    await asyncio.to_thread(subprocess.run, command, check=True)


def gone(result: Result, *words: str) -> None:
    """The variable is not there after a failover, and the error says why."""
    assert result.error.startswith("NotReplicatedError"), (result.error, result.value)
    assert all(word in result.error for word in words), result.error


def chunks(disk: Path) -> list[Path]:
    return [path for path in (disk / folder_of("ada")).iterdir() if "." not in path.name]


async def test_a_full_file_system_costs_the_value_that_found_no_room_until_there_is_some(
    notebook: Notebook, disk: Path
) -> None:
    await notebook.run("other = os.urandom(1_000_000); at = hashlib.sha256(other).hexdigest()")
    result = await notebook.channels.execute("big = os.urandom(100_000_000); small.append(2)", 60)
    assert result.status == "ok"
    await eventually(lambda: _tells(notebook, "big", "is full"), "the store is full", 30)
    await told(notebook, "big", "is full")
    await notebook.run("small.append(3)")
    await enlarge(disk, 4)
    await notebook.run("digest = hashlib.sha256(big).hexdigest()", 60)
    await replicated(notebook, "big")
    await fails_over(notebook)
    assert await notebook.run("(small, hashlib.sha256(big).hexdigest() == digest)", 60) == "([1, 2, 3], True)"
    assert await notebook.run("hashlib.sha256(other).hexdigest() == at") == "True"
    await notebook.run("del big")


async def test_after_a_failover_the_name_says_that_the_store_was_full(notebook: Notebook, disk: Path) -> None:
    await enlarge(disk, 4)
    result = await notebook.channels.execute("big = os.urandom(400_000_000); small.append(2)", 60)
    assert result.status == "ok"
    await eventually(lambda: _tells(notebook, "big", "is full"), "the store is full", 30)
    await fails_over(notebook)
    gone(await notebook.channels.execute("len(big)"), "big", "is full")
    assert await notebook.run("small") == "[1, 2]"
    assert await notebook.run("big = os.urandom(1_000_000); len(big)") == "1000000"
    await replicated(notebook, "big")
    await fails_over(notebook)
    assert await notebook.run("len(big)") == "1000000"


async def _tells(notebook: Notebook, name: str, word: str) -> bool:
    return word in (await notebook.model())["lost"].get(name, "")


async def test_a_chunk_that_is_gone_costs_its_variable_only_and_running_the_cell_again_heals_it(
    notebook: Notebook, disk: Path
) -> None:
    await enlarge(disk, 16)  # what a refused value had stored before stays for a while
    make = "wide = bytes(range(256)) * 80_000; other = [bytes(100_000)]"
    before = set(chunks(disk))
    await notebook.run("other = [bytes(100_000)]")
    await notebook.settled()
    kept = set(chunks(disk))
    await notebook.run(make)
    await notebook.settled()
    for path in set(chunks(disk)) - kept - before:
        path.unlink()
    await from_the_log(notebook)
    gone(await notebook.channels.execute("len(wide)"), "wide", "is not in the blob store")
    await told(notebook, "wide", "is not in the blob store")
    assert await notebook.run("len(other[0]), small") == "(100000, [1])"
    await notebook.run(make)
    await replicated(notebook, "wide")
    await from_the_log(notebook)
    assert await notebook.run("len(wide)") == "20480000"


async def test_a_chunk_that_is_gone_is_told_as_soon_as_a_standby_lacks_it(notebook: Notebook, disk: Path) -> None:
    kept = set(chunks(disk))
    await notebook.run("wide = bytes(range(255)) * 80_000")
    standby = next(replica for replica in await notebook.settled() if replica.role != "executor")
    for path in set(chunks(disk)) - kept:
        path.unlink()
    os.kill(standby.pid, signal.SIGKILL)
    await eventually(lambda: _tells(notebook, "wide", "not in the blob store"), "a standby lacks it", 20)
    assert await notebook.run("len(wide), small") == "(20400000, [1])"


async def test_a_flipped_bit_is_found_and_costs_its_variable_only(notebook: Notebook, disk: Path) -> None:
    kept = set(chunks(disk))
    make = "wide = bytes(range(254)) * 80_000"
    await notebook.run(make)
    await notebook.settled()
    path = max(set(chunks(disk)) - kept, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[777] ^= 8
    path.write_bytes(content)
    await from_the_log(notebook)
    gone(await notebook.channels.execute("len(wide)"), "wide", "is damaged")
    assert await notebook.run("small") == "[1]"
    assert path.with_name(path.name + ".corrupt").exists()
    await notebook.run(make)
    await replicated(notebook, "wide")
    await from_the_log(notebook)
    assert await notebook.run("len(wide)") == "20320000"


@pytest.fixture
def s3() -> Iterator[S3Server]:
    server = S3Server().start()
    yield server
    server.stop()


async def test_an_s3_server_that_is_stopped_and_started_again(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(tmp_path / "state", module="tests.system.up_on_s3")
    monkeypatch.setenv("TEST_S3_ENDPOINT", s3.url)
    cluster.start()
    try:
        notebook = await Notebook.open(cluster, "ada")
        await notebook.run("import os; small = [1]; old = os.urandom(1_000_000); head = old[:4]")
        await notebook.settled()
        s3.stop()
        result = await notebook.channels.execute("new = os.urandom(1_000_000); small.append(2); end = new[-4:]", 60)
        assert result.status == "ok"
        await eventually(lambda: _tells(notebook, "new", "does not answer"), "the store is away", 60)
        await told(notebook, "new", "does not answer")
        s3.start()
        await notebook.run("small.append(3)", 60)
        await replicated(notebook, "new")
        await fails_over(notebook)
        assert await notebook.run("(small, new[-4:] == end, old[:4] == head)", 60) == "([1, 2, 3], True, True)"
        await notebook.close()
    finally:
        assert await asyncio.to_thread(cluster.stop) == []
