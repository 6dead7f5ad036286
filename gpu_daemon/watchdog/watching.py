"""The watchdog's hands: looks at the devices, knows whose each process is, and carries out what the policy says."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from gpu_daemon.aside import aside
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.lineage import kin
from gpu_daemon.replica import LocalReplica
from gpu_daemon.site import Site, log
from gpu_daemon.watchdog.policy import Act, Policy, Sample, Watchdog
from gpu_daemon.watchdog.usage import Use

STRANGERS = 1000
"""Processes of nobody that are remembered as named."""


class GPUWatch:
    """read: what processes use, blocking. every: seconds between two looks."""

    def __init__(self, read: Callable[[], Sequence[Use] | None], policy: Policy, every: float) -> None:
        self._read, self._every = read, every
        self._watchdog, self._slack = Watchdog(policy), policy.slack
        self._handles: dict[ReplicaId, object] = {}
        self._strangers: set[tuple[str, int]] = set()
        self._pids: dict[ReplicaId, set[int]] = {}
        self.measured: Callable[[ReplicaId, Mapping[str, int]], None] = lambda *_: None
        """Called with what a replica's processes have, by device, beyond the slack that every process has."""

    def pids(self, id: ReplicaId) -> list[int]:
        """The replica's processes that were on a device at the last look."""
        return sorted(self._pids.get(id, ()))

    async def run(self, site: Site) -> None:
        """For as long as the daemon lives. A driver that hangs holds up nothing but this."""
        while True:
            await self._once(site)
            await asyncio.sleep(self._every)

    async def _once(self, site: Site) -> None:
        before = {id: _doing(replica) for id, replica in site.replicas.items()}
        try:
            uses = await aside(self._read, "looking at the GPUs' processes")
        except Exception as err:  # noqa: BLE001 - a binding's complaint about a driver must not end the watch
            log.warning("what processes do on the GPUs cannot be read: %s", err)
            uses = None
        if uses is None:
            self._watchdog.blind(site.now())
        else:
            self.look(site, uses, {id for id, replica in site.replicas.items() if before.get(id) == _doing(replica)})

    def look(self, site: Site, uses: Sequence[Use], steady: Collection[ReplicaId] = ()) -> None:
        """Decide about what was read, and carry it out. steady: replicas in which no cell began or ended meanwhile."""
        self._forget_the_dead(site)
        samples = self._samples(site, uses)
        for id in steady:
            mine = [sample for sample in samples if sample.replica == id]
            if all(sample.memory >= 0 for sample in mine):
                self.measured(id, {sample.uuid: max(0, sample.memory - self._slack) for sample in mine})
        for act in self._watchdog.decide(samples, site.now()):
            replica = site.replicas.get(act.replica)
            if replica is not None:
                carry_out(replica, act)

    def _forget_the_dead(self, site: Site) -> None:
        now = {id: replica.handle for id, replica in site.replicas.items() if replica.handle is not None}
        for id, handle in self._handles.items():
            if now.get(id) is not handle:
                self._watchdog.died(id)
        self._handles = dict(now)

    def _samples(self, site: Site, uses: Sequence[Use]) -> list[Sample]:
        """One for each replica on each device that it uses or holds."""
        found: defaultdict[tuple[ReplicaId, str], list[Use]] = defaultdict(list)
        self._pids = {}
        for use in uses:
            process = kin(use.pid)
            replica = next(
                (r for r in site.replicas.values() if r.handle is not None and r.handle.holds(process)), None
            )
            if replica is None:
                self._name_stranger(use)
            else:
                found[replica.id, use.uuid].append(use)
                self._pids.setdefault(replica.id, set()).add(use.pid)
        for replica in site.replicas.values():
            for share in budgets(replica):
                found.setdefault((replica.id, share), [])
        return [_sample(id, uuid, of, budgets(site.replicas[id]).get(uuid)) for (id, uuid), of in found.items()]

    def _name_stranger(self, use: Use) -> None:
        who = (use.uuid, use.pid)
        if who in self._strangers:
            return
        if len(self._strangers) >= STRANGERS:
            self._strangers.clear()
        self._strangers.add(who)
        log.warning(
            "process %d uses GPU %s and is no replica's: what it takes is missing from what cells are granted; run it "
            "elsewhere, or take the device out of GPUDaemon.device_uuids",
            use.pid,
            use.uuid,
        )


def _doing(replica: LocalReplica) -> tuple[object, object, object]:
    """What is another one when a cell has begun or ended, or the process."""
    held = replica.held
    return replica.handle, held, held.grant if held is not None else None


def budgets(replica: LocalReplica) -> dict[str, int]:
    """Bytes of device memory that a replica holds now, by device."""
    grant = replica.held.grant if replica.held is not None else None
    return {share.uuid: share.memory for share in grant.shares} if grant is not None else {}


def _sample(id: ReplicaId, uuid: str, uses: Sequence[Use], budget: int | None) -> Sample:
    """A replica's processes on one device together. One of them not told: the sum is not known, unless it is over."""
    told = [use.memory for use in uses if use.memory >= 0]
    busy = [use.busy for use in uses if use.busy >= 0]
    memory = sum(told) if told or not uses else -1
    return Sample(id, uuid, memory, sum(busy) if busy or not uses else -1, budget)


def carry_out(replica: LocalReplica, act: Act) -> None:
    """Tell the replica, which tells its user; a restart does not wait for that."""
    log.warning("%s: %s: %s", replica.name, act.stage, act.text)
    replica.push({"type": "gpu_misuse", "stage": act.stage, "text": act.text})
    if act.stage == "restart":
        replica.end(act.text.removeprefix("NBOS: "))
