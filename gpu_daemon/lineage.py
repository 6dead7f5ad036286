"""Whose a process of this host is: the processes that it descends from, its session and its control group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEPTH = 64
"""Generations that are looked at: no sane tree is deeper, and a tree that changes meanwhile must not hold us up."""


@dataclass(frozen=True)
class Kin:
    """A process: family: itself, its ancestors, and the leaders of their sessions; group: its control group, which
    names the container. Both are empty when it is gone.

    The session still tells whose a process is when its parent has ended and it was given to init.
    """

    pid: int
    family: frozenset[int]
    group: str


def kin(pid: int) -> Kin:
    """What can be seen of the process now."""
    return Kin(pid, _family(pid), _read(f"/proc/{pid}/cgroup") if pid > 0 else "")


def _family(pid: int) -> frozenset[int]:
    found: set[int] = set()
    for _ in range(DEPTH):
        if pid <= 1:
            break
        # The name, in brackets, may itself hold brackets and blanks.
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        if len(fields) < 4:
            break
        found |= {pid, int(fields[3])}
        pid = int(fields[1])
    return frozenset(found - {0, 1})


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
