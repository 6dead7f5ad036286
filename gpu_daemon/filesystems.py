"""Which file systems are this machine's own: a read from them ends soon, with bytes or an error.

Another machine's may stop answering for as long as it likes, and whoever reads from it then hangs.
"""

from __future__ import annotations

import re
from pathlib import Path

LOCAL = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})
"""Any other, and any that is not known, counts as another machine's."""

_ESCAPED = re.compile(r"\\([0-7]{3})")


def is_local(path: Path, mounts: str | None = None) -> bool:
    """Whether `path` lies on one of these. mounts: what /proc/self/mountinfo holds."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return False
    path, found = path.resolve(), (Path(), "")
    for line in mounts.splitlines():
        front, _, back = line.partition(" - ")
        place = Path(_ESCAPED.sub(lambda match: chr(int(match[1], 8)), front.split(" ")[4]))
        if path.is_relative_to(place) and len(place.parts) >= len(found[0].parts):  # the later one covers the earlier
            found = place, back.split(" ")[0]
    return found[1] in LOCAL
