"""Carrying out what `tiers` decides: replicas are asked to give device memory back, and their answers come in here.

Guarantees: what a replica told is on this host's disk before its grant ends, and what comes back to a device before the
driver is asked for that, so that the next daemon counts it too; no replica is asked whose connection is down or whose
cell runs; a process that the driver holds is thawed only on a device that it can use.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping

from gpu_daemon import memory
from gpu_daemon.book import Holder
from gpu_daemon.checkpoint.freezer import FILE, Freezer, Frozen
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.replica import LocalReplica
from gpu_daemon.requests import GaveBack
from gpu_daemon.rundir import read_json
from gpu_daemon.site import Site, log
from gpu_daemon.tiers import GIB, TIERS, Ask, Died, Froze, Gave, GivingBack, Measured, Row, Told, Woke
from nbos_cluster.records import GrantRecord, Leftover

CONTEXT = GIB
"""What a checkpoint has besides tensors: CUDA's context, libraries' workspaces. As the watchdog's slack."""
SPARE = GIB
"""Bytes of the host's memory that stay free."""
CHECKPOINT = "another cell waits for the GPU memory that this process kept, so the driver moves it to host memory"
QUIET = "another cell waits for the GPU memory that this process kept, and it gives none back"


class Giving:
    """`tiers` is of this host's ledger. Whoever calls `told`, `gave` or `died` looks at the queue afterwards."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.tiers = GivingBack(site.ledger, site.settings.giving_back, self._cell_runs)
        self.freezer: Freezer | None = None
        self._opened = asyncio.Event()
        self._asks = itertools.count(1)
        self.pids: Callable[[ReplicaId], list[int]] = lambda _: []
        """The processes of a replica that NVML saw on a device; [] where none is known."""
        self.room_changed: Callable[[], None] = lambda: None
        self._settled = asyncio.Event()
        """Set, and made anew, when a checkpoint is over."""
        self._thawing = asyncio.Lock()
        self.changed: Callable[[], None] = lambda: None
        """Called when what processes have has changed."""
        self.bids: Callable[[ReplicaId], bool] = lambda _: False
        """Whether a bid of this replica is open."""
        self._saved: dict[ReplicaId, dict[str, int]] = {}
        self._known = {device.uuid for device in site.ledger.devices}
        self._real = {device.uuid for device in site.ledger.devices if device.kind == "nvml"}

    # -- what is heard ------------------------------------------------------------------------------------------------

    def told(self, replica: LocalReplica, left: Mapping[str, int], peak: Mapping[str, int] | None = None) -> None:
        """What its process has on devices, with a cell's end or a hello."""
        here, whose = self._here(left), holder(replica)
        real = frozenset(here) & self._real
        if real and replica.frozen is None:
            self._site.ledger.homes[whose] = real
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
        if (replica := self._site.replicas.get(id)) is not None:
            self._save(replica)

    def died(self, replica: LocalReplica) -> None:
        self.tiers.handle(Died(holder(replica)))
        self._site.ledger.homes.pop(holder(replica), None)
        replica.frozen = None
        (replica.folder / FILE).unlink(missing_ok=True)
        self._save(replica)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    async def open(self, freezer: Freezer | None) -> None:
        """From now on processes are checkpointed, where the driver can. Those that an earlier daemon left frozen are
        looked at first."""
        frozen = [replica for replica in self._site.replicas.values() if replica.frozen is not None]
        why = "no real GPU is used here"
        if freezer is not None and (frozen or self._wanted()):
            why = await freezer.open()
        elif freezer is not None:
            why = f"GivingBack.at_most is {self.tiers.policy.at_most!r}"
        log.info("GPU memory goes to host memory by checkpoints%s", f" not: {why}" if why else ", where it must")
        self.freezer = freezer
        for replica in frozen:
            await self._look_again(replica)
        self.tiers.checkpoints = why if self._wanted() else "it is switched off"
        self._opened.set()

    def _wanted(self) -> bool:
        return TIERS.index(self.tiers.policy.at_most) >= TIERS.index("checkpoint")

    async def _look_again(self, replica: LocalReplica) -> None:
        """An earlier daemon ended while it froze or thawed this process, or after: have it frozen for certain."""
        what, whose = replica.frozen, holder(replica)
        if what is None:
            return
        if self.freezer is None:
            replica.end("what it had on the GPU is in a checkpoint, and this daemon uses no real GPU")
            return
        trouble = await self.freezer.freeze(replica, what)
        if replica.frozen is not what:
            return  # it died
        if not trouble:
            self.tiers.handle(Froze(whose, what.size, certain=True))
            self._site.ledger.homes[whose] = self.freezer.homes(what.uuid)
        else:
            replica.end(f"an earlier daemon was freezing it, and how it stands cannot be told: {trouble}")
        self._save(replica)
        self.room_changed()

    async def _freeze(self, replica: LocalReplica) -> None:
        stays = "the daemon failed"
        try:
            stays = await self._frozen(replica)
        except OSError as err:
            stays = f"its checkpoint cannot be noted on the host's disk ({err.strerror})"
        finally:
            if stays:
                self.tiers.handle(Gave(holder(replica), "checkpoint", self._site.now(), None, stays))
                replica.push({"type": "thawed"})
                log.info("%s: not checkpointed: %s", replica.name, stays)
            self._settled.set()
            self._settled = asyncio.Event()
            self.room_changed()

    async def _frozen(self, replica: LocalReplica) -> str:
        """What stands in the way of it, '' where it is done."""
        began, whose, left = self._site.now(), holder(replica), self._site.ledger.left(holder(replica))
        size, handle, freezer = sum(left.values()), replica.handle, self.freezer
        if freezer is None or handle is None:
            return "its process has ended"
        pids = self.pids(replica.id) or ([handle.pid] if not handle.container else [])
        stays = "its own next cell waits" if self.bids(replica.id) else freezer.refused(pids, list(left))
        stays = stays or await self._rest(replica)
        if stays:
            return stays
        uuid = next(iter(left))
        device = next(d for d in self._site.ledger.devices if d.uuid == uuid)
        what = Frozen(pids[0], uuid, min(size + CONTEXT, device.memory))
        stays = await freezer.freeze(replica, what)
        if stays or replica.handle is not handle:
            return stays or "its process has ended"
        replica.frozen = what
        self._site.ledger.homes[whose] = freezer.homes(uuid)
        self.tiers.handle(Gave(whose, "checkpoint", self._site.now(), {}, away=what.size))
        seconds = self._site.now() - began
        self._site.meters.gave_back("checkpoint", size, seconds)
        log.info("%s: checkpointed %.1f GiB in %.1f s", replica.name, size / GIB, seconds)
        self._save(replica)
        return ""

    async def _rest(self, replica: LocalReplica) -> str:
        """Its process asks before it calls CUDA, from its answer on. Why it does not come to that."""
        if replica.session is None:
            return "its process is not connected to the daemon"
        replica.resting, number = asyncio.get_running_loop().create_future(), next(self._asks)
        replica.rest_number = number
        replica.push({"type": "give_back", "ask": "checkpoint", "number": number, "why": CHECKPOINT})
        try:
            async with asyncio.timeout(self.tiers.policy.within):
                await replica.resting
        except TimeoutError:
            return f"a cell began, or it did not come to rest within {self.tiers.policy.within:.0f} s"
        finally:
            replica.resting = None
        return ""

    async def settled(self, replica: LocalReplica) -> None:
        """Returns when no checkpoint of it is under way."""
        while self.tiers.busy_with(holder(replica)) == "checkpoint":
            if replica.resting is not None and not replica.resting.done():
                replica.resting.set_exception(TimeoutError())  # a cell begins: it stays as it is
            await self._settled.wait()

    async def thaw(self, replica: LocalReplica, uuid: str) -> tuple[str, bool]:
        """Room is reserved on `uuid` for what it brings. What is in the way, and whether that is for good."""
        await self._opened.wait()
        async with self._thawing:
            return await self._thaw(replica, uuid)

    async def _thaw(self, replica: LocalReplica, uuid: str) -> tuple[str, bool]:
        what = replica.frozen
        if what is None:
            return "", False  # another wait for the same came first
        if self.freezer is None:
            return "its process is being ended", True
        if uuid not in self.freezer.homes(what.uuid):
            replica.end(gone := f"what it had on GPU {what.uuid} can be restored on no other, and that is out of use")
            return gone, True
        if lacks := await self.freezer.lacks(what, uuid):
            return lacks, False
        began = self._site.now()
        self._site.rundir.save_left(replica.id, {uuid: what.size})
        self._saved[replica.id] = {uuid: what.size}
        if trouble := await self.freezer.thaw(replica, what, uuid):
            return trouble, True
        replica.frozen = None
        self.tiers.handle(Woke(holder(replica), uuid))
        self._save(replica)
        self._site.ledger.homes[holder(replica)] = frozenset([uuid])
        replica.push({"type": "thawed"})
        log.info(
            "%s has %.1f GiB on %s again after %.1f s", replica.name, what.size / GIB, uuid, self._site.now() - began
        )
        return "", False

    def found(self, replica: LocalReplica) -> None:
        """An earlier daemon's replica lives: what its process had counts until it tells again."""
        self.told(replica, self._site.rundir.load_left(replica.id))
        what = read_json(replica.folder / FILE)
        if what is not None:
            replica.frozen = Frozen(**what)
            self._site.ledger.homes[holder(replica)] = frozenset([replica.frozen.uuid])
            self.tiers.handle(Froze(holder(replica), replica.frozen.size))

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
        elif ask.tier == "checkpoint":
            self._site.spawn(self._freeze(replica), f"checkpointing {replica.name}")
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
            self.changed()

    def leftovers(self) -> tuple[Leftover, ...]:
        """For the host's record: of processes that hold no grant."""
        found = []
        for row in self.tiers.rows():
            replica = self._site.replicas.get(ReplicaId(*row.holder))
            if replica is None or self._site.ledger.holds_any(row.holder):
                continue
            kernel, index = row.holder
            what, tier = dict(row.left), row.tier
            if replica.frozen is not None:
                what, tier = {replica.frozen.uuid: replica.frozen.size}, "checkpoint"
            found += [Leftover(uuid, kernel, index, row.owner, size, tier) for uuid, size in what.items()]
        return tuple(found)

    def rows(self) -> list[Row]:
        """What lies where, for people."""
        return list(self.tiers.rows())


def holder(of: LocalReplica | GrantRecord) -> Holder:
    if isinstance(of, GrantRecord):
        return (of.kernel, of.replica)
    return (of.id.kernel, of.id.index)
