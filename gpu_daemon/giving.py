"""Carrying out what `tiers` decides: replicas are asked to give device memory back, and their answers come in here.

Guarantees: what a replica told is on this host's disk before its grant ends, so that the next daemon counts it too; no
replica is asked whose connection is down or whose cell runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpu_daemon import memory
from gpu_daemon.book import Holder
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.replica import LocalReplica
from gpu_daemon.requests import GaveBack
from gpu_daemon.site import Site, log
from gpu_daemon.tiers import GIB, Ask, Died, Gave, GivingBack, Measured, Row, Told
from nbos_cluster.records import GrantRecord

SPARE = GIB
"""Bytes of the host's memory that stay free."""
QUIET = "another cell waits for the GPU memory that this process kept, and it gives none back"


class Giving:
    """`tiers` is of this host's ledger. Whoever calls `told`, `gave` or `died` looks at the queue afterwards."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.tiers = GivingBack(site.ledger, site.settings.giving_back, self._cell_runs)
        self._saved: dict[ReplicaId, dict[str, int]] = {}
        self._known = {device.uuid for device in site.ledger.devices}
        self._real = {device.uuid for device in site.ledger.devices if device.kind == "nvml"}

    # -- what is heard ------------------------------------------------------------------------------------------------

    def told(self, replica: LocalReplica, left: Mapping[str, int], peak: Mapping[str, int] | None = None) -> None:
        """What its process has on devices, with a cell's end or a hello."""
        here = self._here(left)
        self.tiers.handle(Told(holder(replica), self._owner(replica), self._site.now(), here, self._here(peak or {})))
        self._save(replica)

    def gave(self, replica: LocalReplica, said: GaveBack) -> None:
        """Its answer to `give_back`."""
        event = Gave(holder(replica), "offload", self._site.now(), self._here(said.left), said.stays)
        self.tiers.handle(event)
        self._save(replica)
        self._site.meters.gave_back("offload", said.moved, said.seconds)
        stays = f"; what stays: {said.stays}" if said.stays else ""
        log.info("%s moved %.1f GiB to host memory%s", replica.name, said.moved / GIB, stays)

    def measured(self, id: ReplicaId, used: Mapping[str, int]) -> None:
        """What NVML says that its processes have, beyond what every process may have."""
        self.tiers.handle(Measured((id.kernel, id.index), self._here(used)))

    def died(self, replica: LocalReplica) -> None:
        self.tiers.handle(Died(holder(replica)))
        self._save(replica)

    # -- what is done -------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Ask for what the first who could go in lacks. After every look at the queue."""
        site = self._site
        if not len(site.queue) or site.stopping:
            return
        for ask in self.tiers.decide(site.queue.shortage(site.now()), site.now()):
            replica = site.replicas.get(ReplicaId(*ask.holder))
            if replica is not None:
                self._carry_out(replica, ask)

    def _carry_out(self, replica: LocalReplica, ask: Ask) -> None:
        no_room = self._no_host_memory(replica) if ask.tier in ("offload", "checkpoint") else ""
        if no_room:
            log.info("%s is not asked for its GPU memory (%s): %s", replica.name, ask.tier, no_room)
            self.tiers.handle(Gave(ask.holder, ask.tier, self._site.now(), None, no_room))
            return
        log.info("%s is asked for its GPU memory (%s): %s", replica.name, ask.tier, ask.why)
        if ask.tier == "restart":
            replica.end(QUIET)
        elif replica.session is None:
            lost = "its process is not connected to the daemon"
            self.tiers.handle(Gave(ask.holder, ask.tier, self._site.now(), None, lost))
        else:
            replica.push({"type": "give_back", "ask": ask.tier, "why": ask.why})

    def _no_host_memory(self, replica: LocalReplica) -> str:
        """Why what it has on real devices cannot go to host memory, '' where it can."""
        left = self._site.ledger.left(holder(replica))
        size = sum(size for uuid, size in left.items() if uuid in self._real)
        free, view = memory.host.available(), self._site.view(replica.id.kernel)
        if size and size + SPARE > free:
            return f"the host has {free / GIB:.1f} GiB of memory left, {size / GIB:.1f} GiB would come"
        limit = view.spec.memory_limit if view is not None and view.spec is not None else 0
        used = memory.resident(replica.handle.pid) if replica.handle is not None else 0
        if size and limit and used + size > limit:
            return (
                f"its memory limit is {limit / GIB:.1f} GiB, it uses {used / GIB:.1f} and {size / GIB:.1f} would come"
            )
        return ""

    # -- what it needs to know ----------------------------------------------------------------------------------------

    def _cell_runs(self, whose: Holder) -> bool:
        """Whether a cell runs there that has no grant; its claim is not decided."""
        replica = self._site.replicas.get(ReplicaId(*whose))
        held = replica.held if replica is not None else None
        return held is not None and held.grant is None and not held.claim.grant

    def _owner(self, replica: LocalReplica) -> str:
        view = self._site.view(replica.id.kernel)
        return view.spec.owner if view is not None and view.spec is not None else ""

    def _here(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {uuid: size for uuid, size in sizes.items() if uuid in self._known}

    def _save(self, replica: LocalReplica) -> None:
        left = self._site.ledger.left(holder(replica))
        if left != self._saved.get(replica.id, {}) and replica.folder.is_dir():
            self._saved[replica.id] = left
            self._site.rundir.save_left(replica.id, left)

    def rows(self) -> list[Row]:
        """What lies where, for people."""
        return list(self.tiers.rows())


def holder(of: LocalReplica | GrantRecord) -> Holder:
    if isinstance(of, GrantRecord):
        return (of.kernel, of.replica)
    return (of.id.kernel, of.id.index)
