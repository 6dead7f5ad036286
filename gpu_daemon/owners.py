"""Whose a process on a GPU is: NVML knows process ids, the daemon its replicas.

A process belongs to the replica that it descends from, so that what user code starts counts as the user's. Where the
daemon does not see the ids that NVML tells (it is in a pid namespace of its own), a process is nobody's.
"""

from __future__ import annotations

from msgspec.structs import replace

from gpu_daemon.lineage import kin
from gpu_daemon.site import Site
from nbos_cluster.records import GPUProcess


class Owners:
    def __init__(self, site: Site) -> None:
        self._site = site

    def of(self, process: GPUProcess) -> GPUProcess:
        """With kernel, replica and owner, where it is of a replica of this host."""
        this = kin(process.pid)
        for replica in self._site.replicas.values():
            if replica.handle is not None and replica.handle.holds(this):
                view = self._site.view(replica.id.kernel)
                owner = view.spec.owner if view is not None and view.spec is not None else ""
                return replace(process, kernel=replica.id.kernel, replica=replica.id.index, owner=owner)
        return process
