"""Moves replicas: those that an administrator asked for, and all of hosts that drain. A loop around
`nbos_cluster.moving`.

It must guarantee: a move that stands in a kernel's spec is brought to its end, whoever began it; hosts that drain begin
a few moves at a time; a replica that failed on one host is not sent there again at once. Two gateways that do the same
do no harm, as the second one's transaction fails.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nbos_cluster import moving
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import Txn
from nbos_cluster.moving import Retire, Track, Turn, World
from nbos_cluster.placement import NoRoom, choose_target
from nbos_cluster.records import Move

from .copy import ClusterCopy
from .errors import ApiError
from .kernels import Kernels
from .repair import lost_hosts
from .watching import ClusterWatch

log = logging.getLogger("nbos.gateway")

SHORTEST = 0.03
"""Seconds between two looks at the moves that are under way."""
LONGEST = 1.0
TRIES = 50
"""Transactions in a row for one kernel: one that is busy changes between our look and our write."""
HOLD = 15.0
"""Seconds in which a kernel of a draining host is left alone after a move of its came to nothing, doubled each time."""
HOLD_MOST = 600.0


Ended = Callable[[Move, str, float], None]


@dataclass
class Refusal:
    """What became of a kernel's moves off a draining host that failed."""

    until: float = 0.0
    hold: float = HOLD
    hosts: set[str] = field(default_factory=set)


def to_leave(copy: ClusterCopy) -> list[tuple[str, str]]:
    """(kernel, index) of the replicas on draining hosts whose kernels have none on its way: the emptiest host first, so
    that one after the other can be stopped."""
    left: dict[str, list[tuple[str, str]]] = {name: [] for name, host in copy.hosts.items() if host.draining}
    for view in copy.living():
        spec = view.spec
        if spec is None or spec.move is not None:
            continue
        here = [(index, host) for index, host in spec.placement.items() if host in left]
        for index, host in here[:1]:
            left[host].append((view.kernel, index))
    order = sorted(left, key=lambda name: (len(left[name]), name))
    return [item for name in order for item in sorted(left[name])]


class Moves:
    """Runs until it is cancelled. at_a_time: how many moves draining hosts may have under way. ended(move, how, at): is
    told of each move that this gateway brought to its end."""

    def __init__(self, kernels: Kernels, watch: ClusterWatch, grace: float, at_a_time: int, ended: Ended) -> None:
        self.kernels, self.watch, self.grace, self.at_a_time = kernels, watch, grace, at_a_time
        self._ended = ended
        self._tracks: dict[tuple[str, int, float], Track] = {}
        self._refused: dict[str, Refusal] = {}
        self._said: dict[str, str] = {}

    async def run(self) -> None:
        await self.watch.ready.wait()
        while True:
            try:
                pause = await self.round()
            except ApiError as err:  # etcd is away; the next round tries again
                log.warning("replicas cannot be moved: %s", err.message)
                pause = LONGEST
            await asyncio.sleep(SHORTEST)
            await self.watch.change(min(pause, LONGEST))

    async def round(self) -> float:
        """Do what is due; seconds until something may be due again, whatever happens."""
        copy = self.kernels.copy
        under_way = [view.kernel for view in copy.living() if view.spec is not None and view.spec.move is not None]
        self._forget(under_way)
        pauses = await asyncio.gather(*(self._advance(kernel) for kernel in under_way))
        await self._drain(len(under_way))
        return min(pauses, default=math.inf)

    def _forget(self, under_way: Iterable[str]) -> None:
        there = set(under_way)
        self._tracks = {key: track for key, track in self._tracks.items() if key[0] in there}
        draining = any(host.draining for host in self.kernels.copy.hosts.values())
        if not draining:
            self._refused.clear()
            self._said.clear()

    # -- one move -----------------------------------------------------------------------------------------------------

    async def _advance(self, kernel: str) -> float:
        """Take the kernel's move as far as it goes now; the seconds after which it may go on by itself."""
        for _ in range(TRIES):
            view = self.kernels.copy.kernel(kernel)
            if view is None or view.spec is None or view.spec.move is None:
                return math.inf
            move = view.spec.move
            track = self._tracks.setdefault((kernel, move.target, move.since), Track())
            step = moving.decide(view, track, self._world())
            if isinstance(step, moving.Wait):
                return step.seconds
            if await self._carry_out(
                view, moving.turn(view, step) if isinstance(step, Turn) else moving.retire(view, step)
            ):
                self._done(kernel, move, step)
        return SHORTEST

    def _world(self) -> World:
        copy, now = self.kernels.copy, time.monotonic()
        return World(now, lost_hosts(copy, now, self.grace), {n for n, host in copy.hosts.items() if host.draining})

    async def _carry_out(self, view: KernelView, txn: Txn) -> bool:
        """Whether it went through. Either way the copy has moved on when this returns."""
        seen = view.revision
        result = await self.kernels.carry_out(txn)
        await self.watch.until(lambda: self.kernels.copy.kernel(view.kernel) is not view or view.revision > seen, 2.0)
        return result.succeeded

    def _done(self, kernel: str, move: Move, step: Turn | Retire) -> None:
        way = f"kernel {kernel}: replica {move.source} from {move.from_host} to {move.to_host} as {move.target}"
        why = f" ({step.reason})" if step.reason else ""
        if isinstance(step, Turn):
            log.info("%s: %s%s", way, step.phase, why)
            return
        done = step.index == move.source
        self._ended(move, "done" if done else "undone", time.time())
        if done:
            log.info("%s: moved%s", way, why)
            self._refused.pop(kernel, None)
        else:
            log.warning("%s: not moved%s", way, why)
            refusal = self._refused.setdefault(kernel, Refusal())
            refusal.hosts.add(move.to_host)
            refusal.until = time.monotonic() + refusal.hold
            refusal.hold = min(2 * refusal.hold, HOLD_MOST)

    # -- draining -----------------------------------------------------------------------------------------------------

    async def _drain(self, under_way: int) -> None:
        """Begin as many moves as there may be."""
        for kernel, index in to_leave(self.kernels.copy):
            if under_way >= self.at_a_time:
                return
            refusal = self._refused.get(kernel, Refusal())
            if time.monotonic() >= refusal.until and await self._begin(kernel, index, refusal.hosts):
                under_way += 1

    async def _begin(self, kernel: str, index: str, avoid: set[str]) -> bool:
        view = self.kernels.copy.kernel(kernel)
        if view is None or view.spec is None or index not in view.spec.placement:
            return False
        loads = self.kernels.loads()
        try:
            try:
                host = choose_target(view.spec, loads, index, avoid)
            except NoRoom:
                host = choose_target(view.spec, loads, index)
        except NoRoom as err:
            if self._said.get(kernel) != str(err):  # the next round comes soon; say it once
                log.warning("a replica cannot leave host %s: %s", view.spec.placement[index], err)
                self._said[kernel] = str(err)
            return False
        self._said.pop(kernel, None)
        return await self._carry_out(view, moving.begin(view, int(index), host, "drain", time.time()))
