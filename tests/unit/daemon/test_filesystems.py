"""Which disks are this machine's own, by what /proc/self/mountinfo says."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_daemon.filesystems import is_local
from gpu_daemon.sessions import reads_only

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:30 / /shared rw - nfs4 files:/export rw,vers=4.2
31 30 0:31 / /shared/here rw - xfs /dev/vdb rw
32 22 0:32 / /with\040space rw - fuse.sshfs far: rw
33 22 0:33 / /twice rw - ext4 /dev/vdc rw
34 22 0:34 / /twice rw - nfs files:/export rw
""".strip()


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("/blobs", True),
        ("/sharedness", True),
        ("/shared", False),
        ("/shared/blobs", False),
        ("/shared/here/blobs", True),
        ("/with space/blobs", False),
        ("/twice/blobs", False),
    ],
)
def test_the_innermost_mount_counts_and_what_is_not_known_is_not_local(path: str, local: bool) -> None:
    assert is_local(Path(path), MOUNTS) is local


def test_nothing_is_local_where_no_mounts_are_told() -> None:
    assert not is_local(Path("/"), "")


@pytest.mark.parametrize(
    ("container", "uid", "given"),
    [("", 0, True), ("", 500, True), ("c", 1000, True), ("c", 0, False), ("c", 500, False)],
)
def test_a_container_of_the_files_owner_or_of_root_could_open_them_for_writing(
    container: str, uid: int, given: bool
) -> None:
    assert reads_only(container, uid, ours=500) is given
