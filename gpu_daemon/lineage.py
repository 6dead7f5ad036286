"""Whose a process of this host is: the processes that it descends from, its session and its control group."""

from __future__ import annotations

from pathlib import Path

DEPTH = 64
"""Generations that are looked at: no sane tree is deeper, and a tree that changes meanwhile must not hold us up."""


def lineage(pid: int) -> set[int]:
    """The process, its ancestors, and the leaders of their sessions; empty when it is gone.

    The session still tells whose a process is when its parent has ended and it was given to init.
    """
    found: set[int] = set()
    for _ in range(DEPTH):
        if pid <= 1:
            break
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            break
        found |= {pid, int(fields[3])}
        pid = int(fields[1])
    return found - {0, 1}


def in_container(pid: int, container: str) -> bool:
    """Whether the process runs in the container of that id, also when it was started there from outside."""
    try:
        return bool(container) and container in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return False
