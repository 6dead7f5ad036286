"""Whose a process on a GPU is: NVML knows process ids, the daemon its replicas.

What user code starts counts as the user's. Where the daemon does not see the ids that NVML tells (it is in a pid
namespace of its own), a process is nobody's.
"""

from __future__ import annotations

from msgspec.structs import replace

from gpu_daemon.lineage import lineage
from gpu_daemon.replica import LocalReplica
from gpu_daemon.site import Site
from nbos_cluster.records import GPUProcess


class Owners:
    def __init__(self, site: Site) -> None:
        self._site = site

    def of(self, process: GPUProcess) -> GPUProcess:
        """With kernel, replica and owner, where it is of a replica of this host."""
        replica = self._replica(process.pid)
        if replica is None:
            return process
        view = self._site.view(replica.id.kernel)
        owner = view.spec.owner if view is not None and view.spec is not None else ""
        return replace(process, kernel=replica.id.kernel, replica=replica.id.index, owner=owner)

    def _replica(self, pid: int) -> LocalReplica | None:
        # Looked up once, not for each replica: this runs in the daemon's loop.
        family = lineage(pid)
        running = [(r, r.handle) for r in self._site.replicas.values() if r.handle is not None]
        for replica, handle in running:
            if handle.pid in family:
                return replica
        return next((replica for replica, handle in running if handle.container and handle.holds(pid)), None)
