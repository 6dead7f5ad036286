"""Whose a process on a GPU is: NVML knows process ids, the daemon its replicas.

A process belongs to the replica that it descends from, so that what user code starts counts as the user's. Where the
daemon does not see the ids that NVML tells (it is in a pid namespace of its own), a process is nobody's.
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from gpu_daemon.site import Site
from nbos_cluster.records import GPUProcess

_DEEPEST = 64
"""Generations that are looked at: more would be a fork bomb, not a program."""


class Owners:
    def __init__(self, site: Site) -> None:
        self._site = site

    def of(self, process: GPUProcess) -> GPUProcess:
        """With kernel, replica and owner, where it is of a replica of this host."""
        replicas = {r.handle.pid: r for r in self._site.replicas.values() if r.handle is not None and r.handle.pid}
        pid = process.pid
        for _ in range(_DEEPEST):
            if pid in replicas:
                id = replicas[pid].id
                view = self._site.view(id.kernel)
                owner = view.spec.owner if view is not None and view.spec is not None else ""
                return replace(process, kernel=id.kernel, replica=id.index, owner=owner)
            pid = _parent(pid)
            if pid <= 1:
                break
        return process


def _parent(pid: int) -> int:
    """0 where it cannot be told."""
    try:
        # The name, in brackets, may itself hold brackets and blanks.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
