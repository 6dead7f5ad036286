"""A run directory on a file system that is full, for real: neither a byte nor a name more can be written there."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import create, grants_of, kernel_spec
from tests.system.etcdserver import eventually


class Disk:
    """Small; `fill` leaves no room, `empty` takes away what filled it."""

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "filler"

    def fill(self) -> None:
        self._filler.mkdir()
        with pytest.raises(OSError, match="No space left"):
            self._write()
        with pytest.raises(OSError, match="No space left"):
            self._name()

    def _write(self) -> None:
        with open(self._filler / "bytes", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def _name(self) -> None:
        for n in itertools.count():
            os.mknod(self._filler / str(n))

    def empty(self) -> None:
        for file in self._filler.iterdir():
            file.unlink()
        self._filler.rmdir()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """The run directory of host a. Ask for it before `host`, which ends the daemon first."""
    path = tmp_path / "a"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=300", "small", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "-l", path], check=True)


async def test_cells_run_on_a_full_disk_and_what_must_be_written_is_refused_with_the_reason(
    client: Etcd, disk: Disk, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    lead = await replica.bid(1, tpcs=2)
    assert (await replica.append(1, lead["token"]))["ok"]
    disk.fill()
    lead = await replica.bid(2)
    assert lead["answer"] == "lead"
    assert (await replica.append(2, lead["token"]))["ok"]
    refused = await replica.bid(3, tpcs=2)
    assert refused["code"] == "unavailable"
    assert "host a cannot write to its disk (No space left on device)" in refused["reason"]
    assert await grants_of(client, "a") == []
    disk.empty()
    lead = await replica.bid(3, gpus=2)
    assert lead["answer"] == "lead", "nothing is held for what was refused"


async def test_a_new_replica_that_a_full_disk_refuses_is_told_and_started_when_there_is_room(
    client: Etcd, disk: Disk, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    await a.replica("k", 0).ready()
    disk.fill()
    await create(client, kernel_spec("new", "a"))
    await eventually(lambda: "No space left on device" in a.log.read_text(), "the daemon says why", 10)
    lead = await a.replica("k", 0).bid(1)
    assert lead["answer"] == "lead", "the daemon goes on"
    disk.empty()
    await a.replica("new", 0).ready()


async def test_a_lease_lost_on_a_full_disk_is_renewed(client: Etcd, disk: Disk, host: MakeHost) -> None:
    """Nothing notes the new one, but the host must not be lost for that."""
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    disk.fill()
    assert a.process is not None
    os.kill(a.process.pid, signal.SIGSTOP)
    await asyncio.sleep(3)  # past its lease
    os.kill(a.process.pid, signal.SIGCONT)
    await eventually(lambda: "granting another" in a.log.read_text(), "it has a new lease", 10)
    lead = await replica.bid(1)
    assert lead["answer"] == "lead"
    await asyncio.sleep(3)  # it would end again if nobody kept it alive
    assert (await replica.append(1, lead["token"]))["ok"]
    assert "a restart of this daemon will not find what it should" in a.log.read_text()


async def test_a_daemon_killed_on_a_full_disk_finds_its_replica_and_accounts_again(
    client: Etcd, disk: Disk, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    before = await replica.ready()
    lead = await replica.bid(1, gpus=1)
    disk.fill()
    a.kill()
    a.start()
    assert (await replica.ready())["pid"] == before["pid"]
    assert [g.kernel for g in await grants_of(client, "a")] == ["k"]
    assert (await replica.append(1, lead["token"]))["ok"]
    assert not list(disk.path.glob("accounts.db.broken-*"))
