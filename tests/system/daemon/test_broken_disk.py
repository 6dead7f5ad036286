"""A disk that cannot read some of its blocks, for real: a file system in a file, of which the end was cut off."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_daemon.blobs import BlobCorrupt, BlobMissing
from gpu_daemon.directory_store import DirectoryStore
from nbos_cluster.content import address

MEBIBYTE = 1 << 20
DATA = os.urandom(16 * MEBIBYTE)
HASH = address(DATA)


class Disk:
    """`break_off`: what lies behind 4 MiB is gone, and reading it gives EIO; `mend`: there is room again."""

    def __init__(self, image: Path, path: Path) -> None:
        self.image, self.path = image, path

    def break_off(self) -> None:
        os.sync()
        for file in self.path.rglob("*"):
            if file.is_file():
                handle = os.open(file, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)
        os.truncate(self.image, 4 * MEBIBYTE)

    def mend(self) -> None:
        os.truncate(self.image, 64 * MEBIBYTE)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    image, path = tmp_path / "image", tmp_path / "disk"
    path.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 * MEBIBYTE)
    for command in (
        ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image)],
        ["mount", "-o", "loop", str(image), str(path)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("mkfs.ext4 is not there")
        if done.returncode:
            pytest.skip(f"no file system in a file can be mounted here: {done.stderr.strip()}")
    yield Disk(image, path)
    os.truncate(image, 64 * MEBIBYTE)
    subprocess.run(["umount", "-l", path], check=True)


def test_a_blob_that_the_disk_cannot_read_is_told_as_that_and_can_be_put_again(disk: Disk) -> None:
    store = DirectoryStore(disk.path / "blobs")
    store.put("ann", HASH, DATA)
    disk.break_off()
    with pytest.raises(BlobCorrupt, match="the disk cannot read it: Input/output error"):
        store.read_into("ann", HASH, memoryview(bytearray(len(DATA))))
    with pytest.raises(BlobMissing):
        store.get("ann", HASH)
    disk.mend()
    store.put("ann", HASH, DATA)
    assert store.get("ann", HASH) == DATA


def test_putting_a_blob_that_the_disk_cannot_read_any_more_heals_it_and_ends_no_process(disk: Disk) -> None:
    store = DirectoryStore(disk.path / "blobs")
    store.put("ann", HASH, DATA)
    disk.break_off()
    store.put("ann", HASH, DATA)
    disk.mend()
    assert store.get("ann", HASH) == DATA
