"""A replica moves between hosts while its kernel is used: what to do next, and the transactions that do it. No IO.

The new replica is made first, under a number of its own, and catches up while the old one goes on; then the old one
takes no new cells; when its last cell has ended and has been heard, it is removed. The state of a move stands in the
kernel's spec (`records.Move`), so that any gateway resumes it; what a gateway remembers besides (`Track`) costs only
time when it is lost.

Guarantees:
- no cell ends by a move: a replica is removed in a transaction that sees that it holds no claim, and that none came
since;
- the kernel never has fewer replicas that are caught up than before: the one that goes is removed only while the record
of
  the one that stays says `ready`, and never before that one was caught up; a host that died is the exception;
- one replica of a number at a time: a new one gets a number without a place, a record or a claim;
- a move ends: at the target, or back at the source, whichever of both is lost on the way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from . import keys, membership, records
from .kernelview import KernelView
from .kv import Compare, Txn, missing, mod_is, value_is
from .records import KernelSpec, Move, ReplicaRecord

LAG = 2.5
"""Seconds that a replica may be behind and still count as caught up: its record is written once a second."""

SETTLE = 1.0
"""Seconds between the last claim of the one that leaves and its end: changes between cells are replicated, and outputs
that are on their way arrive."""

JOINS_WITHIN = 900.0
"""Seconds in which the new replica must be ready (an image may have to be fetched)."""


@dataclass(frozen=True, slots=True)
class World:
    """now: any steady clock. lost: hosts that are given up. draining: hosts that are to be left."""

    now: float
    lost: Container[str] = ()
    draining: Container[str] = ()


@dataclass(slots=True)
class Track:
    """What one gateway remembers of one kernel's move."""

    began: float = math.nan
    lasts: deque[tuple[float, int]] = field(default_factory=deque)
    quiet: float | None = None
    """Since when the one that leaves holds no claim."""
    leaver: int | None = None

    def see(self, view: KernelView, now: float) -> None:
        if math.isnan(self.began):
            self.began = now
        if not self.lasts or self.lasts[-1][1] != view.last:
            self.lasts.append((now, view.last))
        while len(self.lasts) > 1 and self.lasts[1][0] <= now - LAG:
            self.lasts.popleft()
        leaver = view.spec.move.leaver if view.spec is not None and view.spec.move is not None else None
        if leaver is None or leaver != self.leaver or holds_claim(view, leaver):
            self.leaver, self.quiet = leaver, None
        if leaver is not None and not holds_claim(view, leaver) and self.quiet is None:
            self.quiet = now

    def goal(self) -> int:
        """The newest execution LAG seconds ago, as far as is remembered."""
        return self.lasts[0][1]


@dataclass(frozen=True, slots=True)
class Turn:
    """Go over to another phase."""

    phase: Literal["joining", "leaving", "returning"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Retire:
    """Remove the replica; the move is over. unwatched: its host is lost, so that the other one need not be ready."""

    index: int
    reason: str = ""
    unwatched: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before the records change, or `seconds` have passed."""

    reason: str
    seconds: float = math.inf


Step = Turn | Retire | Wait


def decide(view: KernelView, track: Track, world: World) -> Step:
    """What the move of this kernel needs next. There must be one."""
    spec = view.spec
    assert spec is not None
    assert spec.move is not None
    move = spec.move
    track.see(view, world.now)
    for index, host in ((move.source, move.from_host), (move.target, move.to_host)):
        if host in world.lost and not holds_claim(view, index):  # its claim ends with its lease
            return Retire(index, f"host {host} is lost", unwatched=True)
    if move.phase == "joining":
        return _joining(view, move, track, world)
    return _parting(view, move, track, world)


def _joining(view: KernelView, move: Move, track: Track, world: World) -> Step:
    target, source = view.replicas.get(move.target), ready(view, move.source)
    back = ""
    if move.why == "drain" and move.from_host not in world.draining:
        back = f"host {move.from_host} does not drain any more"
    elif move.to_host in world.draining:
        back = f"host {move.to_host} drains"
    elif target is not None and target.state == "failed" and target.host == move.to_host:
        back = target.reason or "it could not be started"
    elif ready(view, move.target) is None and world.now > track.began + JOINS_WITHIN:
        back = f"it was not ready on host {move.to_host} within {JOINS_WITHIN:g} s"
    if back and source is not None:
        return Turn("returning", back)
    if caught_up(view, move.target, track):
        return Turn("leaving")
    return Wait(progress(view), LAG / 2)


def _parting(view: KernelView, move: Move, track: Track, world: World) -> Step:
    leaver, stays = (move.source, move.target) if move.phase == "leaving" else (move.target, move.source)
    if ready(view, stays) is None:
        # It died: until it is back, cells run on the one that was to leave.
        return Turn("joining") if ready(view, leaver) is not None else Wait(progress(view))
    if holds_claim(view, leaver):
        return Wait(progress(view))
    if not caught_up(view, stays, track):
        return Wait(progress(view), LAG / 2)
    quiet = world.now - (track.quiet if track.quiet is not None else world.now)
    if ready(view, leaver) is not None and quiet < SETTLE:
        return Wait(progress(view), SETTLE - quiet)
    return Retire(leaver, move.reason)


# -- what the records say ---------------------------------------------------------------------------------------------


def ready(view: KernelView, index: int) -> ReplicaRecord | None:
    """The record of the replica, when it is ready where it should be and of the present incarnation."""
    record, spec = view.replicas.get(index), view.spec
    if record is None or spec is None or record.state != "ready" or record.incarnation != spec.incarnation:
        return None
    return record if record.host == spec.placement.get(str(index)) else None


def caught_up(view: KernelView, index: int, track: Track) -> bool:
    record = ready(view, index)
    return record is not None and record.applied >= min(track.goal(), view.last)


def holds_claim(view: KernelView, index: int) -> bool:
    return any(held.record.replica == index for held in view.claims.values())


def leaves(spec: KernelSpec, index: int) -> bool:
    """Whether the replica takes no new cells, since it is about to go."""
    return spec.move is not None and spec.move.leaver == index


def progress(view: KernelView) -> str:
    """How far the move is and what it waits for, for people; '' when there is none. From the records alone."""
    spec = view.spec
    move = spec.move if spec is not None else None
    if move is None:
        return ""
    if move.phase == "joining":
        record = view.replicas.get(move.target)
        if ready(view, move.target) is None:
            why = f": {record.reason}" if record is not None and record.reason else ""
            return f"replica {move.target} starts on host {move.to_host}{why}"
        applied = record.applied if record is not None else -1
        return f"replica {move.target} on host {move.to_host} catches up: has applied {applied} of {view.last}"
    leaver = move.leaver
    assert leaver is not None
    running = next((n for n, held in view.claims.items() if held.record.replica == leaver), None)
    why = f" ({move.reason})" if move.reason else ""
    if running is not None:
        return f"replica {leaver} leaves when cell {running} has ended{why}"
    return f"replica {leaver} leaves{why}"


# -- transactions -----------------------------------------------------------------------------------------------------


def free_index(view: KernelView) -> int:
    """The lowest number that no replica has, or has left anything under."""
    spec = view.spec
    used = {int(i) for i in spec.placement} if spec is not None else set()
    used |= set(view.replicas) | {held.record.replica for held in view.claims.values()}
    return next(i for i in range(len(used) + 1) if i not in used)


def begin(view: KernelView, source: int, host: str, why: str, at: float = 0.0) -> Txn:
    """Make the new replica on `host`. Raises LookupError when a replica moves already, or `source` is none."""
    spec = _known(view)
    if spec.move is not None or str(source) not in spec.placement:
        raise LookupError(f"kernel {view.kernel} has a replica on its way already, or no replica {source}")
    target = free_index(view)
    move = Move(
        source=source,
        target=target,
        from_host=spec.placement[str(source)],
        to_host=host,
        why="drain" if why == "drain" else "asked",
        since=at,
    )
    new = replace(spec, placement=_sorted({**spec.placement, str(target): host}), move=move)
    return _and(membership.change(view, new), missing(keys.replica(view.kernel, target)))


def turn(view: KernelView, step: Turn) -> Txn:
    spec = _known(view)
    assert spec.move is not None
    move = replace(spec.move, phase=step.phase, reason=step.reason or spec.move.reason)
    return membership.change(view, replace(spec, move=move))


def retire(view: KernelView, step: Retire) -> Txn:
    """Fails when the replica may hold a claim by now, or the other one is not as `view` has it."""
    spec = _known(view)
    move = spec.move
    assert move is not None
    over = replace(move, phase="done" if step.index == move.source else "undone", reason=step.reason)
    left = {i: host for i, host in spec.placement.items() if i != str(step.index)}
    txn = membership.change(view, replace(spec, placement=left, move=None, moved=over))
    if step.unwatched:
        return _and(txn, *unclaimed(view))
    stays = move.target if step.index == move.source else move.source
    record = view.replicas[stays]
    return _and(txn, *unclaimed(view), value_is(keys.replica(view.kernel, stays), records.encode(record)))


def unclaimed(view: KernelView) -> list[Compare]:
    """Holds while no claim was made, and none has ended, since `view`."""
    n = view.last + 1
    held = view.claims.get(n)
    claim = keys.claim(view.kernel, n)
    same = missing(claim) if held is None else mod_is(claim, held.token)
    return [same, missing(keys.log_entry(view.kernel, n))]


def _and(txn: Txn, *more: Compare) -> Txn:
    return Txn([*txn.compare, *more], txn.success, txn.failure)


def _sorted(placement: dict[str, str]) -> dict[str, str]:
    return dict(sorted(placement.items(), key=lambda item: int(item[0])))


def _known(view: KernelView) -> KernelSpec:
    if view.spec is None:
        raise LookupError(f"kernel {view.kernel} is not (or no longer) in etcd")
    return view.spec
