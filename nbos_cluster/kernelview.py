"""A process's own copy of one kernel's records, kept from a watch, without IO.

Guarantees: after `apply(Snapshot)` the view is exactly what the snapshot holds, whatever it was before (a
watch starts again with one after compaction); entries come out of `Delta.entries` in order, each once; `last`
is the newest decided execution and never falls while the kernel lives. A record that cannot be read is kept
out of the view and named in `errors`; the others are not held up by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from . import keys, records
from .election import number_of
from .kv import KV, Changes, Event, Snapshot
from .records import Checkpoint, ClaimRecord, Epoch, KernelSpec, LogEntry, RecordError, ReplicaRecord
from .statelog import fold_unread, weight


@dataclass(slots=True)
class Delta:
    """What one Snapshot or Changes altered. entries: newly seen ones. gone: the kernel was deleted."""

    spec: bool = False
    epoch: bool = False
    checkpoint: bool = False
    gone: bool = False
    entries: list[LogEntry] = field(default_factory=list)
    replicas: set[int] = field(default_factory=set)
    claims: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(
            self.spec or self.epoch or self.checkpoint or self.gone or self.entries or self.replicas or self.claims
        )


@dataclass(frozen=True, slots=True)
class Held:
    """A claim as it stands: its record, its token (revision) and the lease that keeps it."""

    record: ClaimRecord
    token: int
    lease: int


class KernelView:
    """spec/epoch/checkpoint with their revisions (`*_rev`, 0 = not there), replicas, claims and the entries
    held."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.spec: KernelSpec | None = None
        self.spec_rev = 0
        self.born = 0
        self.epoch: Epoch | None = None
        self.epoch_rev = 0
        self.checkpoint: Checkpoint | None = None
        self.checkpoint_rev = 0
        self.replicas: dict[int, ReplicaRecord] = {}
        self.claims: dict[int, Held] = {}
        self.log: dict[int, LogEntry] = {}
        self.log_sizes: dict[int, int] = {}
        self.log_revs: dict[int, int] = {}
        self.revision = 0
        self.members_rev = 0
        """Revision at which spec, epoch or replicas were last seen to change: it orders lists of members."""
        self.last = -1
        self.errors: dict[str, str] = {}
        self._executor = -1
        self._prefix = keys.kernel(kernel)

    @property
    def last_committed(self) -> int:
        """The newest decided execution; -1 when the kernel is unknown."""
        return self.last

    @property
    def executor(self) -> int:
        """The replica that runs the open execution, else the one that ran the last; -1 after a restart."""
        held = self.claims.get(self.last + 1)
        return held.record.replica if held is not None else self._executor

    def claim_of(self, n: int) -> Held | None:
        return self.claims.get(n)

    @property
    def empty(self) -> bool:
        """Whether nothing of the kernel is left in etcd."""
        records = (self.spec, self.epoch, self.checkpoint)
        held = self.replicas or self.claims or self.log or self.errors
        return not held and all(record is None for record in records)

    def log_bytes(self) -> int:
        """Weight of the entries that are not folded yet: about their bytes."""
        return sum(self.log_sizes.values())

    def catch_up(self, applied: int) -> tuple[Checkpoint | None, list[LogEntry]]:
        """What a replica that has applied the log up to `applied` (-1: nothing) needs, in order.

        A whole state first when the entries after `applied` are folded, or when a reset made what came before
        worthless. Raises LookupError when entries are missing here (they arrive with the next changes).
        """
        start, state = applied + 1, None
        if self.checkpoint is not None and applied < self.checkpoint.upto:
            start, state = self.checkpoint.upto + 1, self.checkpoint
        reset = max((n for n, entry in self.log.items() if entry.kind == "reset" and n >= start), default=None)
        if reset is not None and (state is not None or applied < 0):
            state, start = fold_unread(state, self.entries(start, reset)), reset + 1
        return state, self.entries(start, self.last)

    def entries(self, first: int, last: int) -> list[LogEntry]:
        """Entries first … last, which must all be held."""
        absent = [n for n in range(first, last + 1) if n not in self.log]
        if absent:
            raise LookupError(f"kernel {self.kernel}: entries {absent[0]} … {absent[-1]} are not held here")
        return [self.log[n] for n in range(first, last + 1)]

    def apply(self, item: Snapshot | Changes) -> Delta:
        """Bring the view up to date and tell what changed. Keys of other kernels are ignored."""
        if isinstance(item, Snapshot):
            return self.from_snapshot(item.kvs, item.revision)
        return self.from_events(item.events, item.revision)

    def from_snapshot(self, kvs: Iterable[KV], revision: int) -> Delta:
        delta = Delta()
        mine = {kv.key: kv for kv in kvs if kv.key.startswith(self._prefix)}
        spec = mine.get(keys.spec(self.kernel))
        # Deleted and made again under the same id while nobody looked: nothing of the old one counts.
        another = spec is not None and self.born not in (0, spec.create_revision)
        for key in [key for key in self._keys() if another or key not in mine]:
            self._delete(key, delta)
        if another:
            self._forget()
        for key in sorted(mine):
            self._put(mine[key], delta)
        return self._finish(delta, revision)

    def from_events(self, events: Iterable[Event], revision: int) -> Delta:
        delta = Delta()
        for event in events:
            if not event.kv.key.startswith(self._prefix):
                continue
            if event.kind == "put":
                self._put(event.kv, delta)
            else:
                with suppress(RecordError):  # a key that is no record was never in the view
                    self._delete(event.kv.key, delta)
        return self._finish(delta, revision)

    def _finish(self, delta: Delta, revision: int) -> Delta:
        self.revision = max(self.revision, revision)
        if delta.spec or delta.epoch or delta.replicas:
            self.members_rev = self.revision
        delta.entries.sort(key=lambda entry: entry.n)
        if self.spec is None and delta.gone:
            self._forget()
        return delta

    def _forget(self) -> None:
        self.last, self._executor, self.born = max(self.log, default=-1), -1, 0

    def _keys(self) -> list[str]:
        k = self.kernel
        there = [
            (keys.spec(k), self.spec),
            (keys.epoch(k), self.epoch),
            (keys.checkpoint(k), self.checkpoint),
        ]
        return [
            *(key for key, record in there if record is not None),
            *(keys.replica(k, index) for index in self.replicas),
            *(keys.claim(k, n) for n in self.claims),
            *(keys.log_entry(k, n) for n in self.log),
            *self.errors,
        ]

    def _put(self, kv: KV, delta: Delta) -> None:
        self.errors.pop(kv.key, None)
        try:
            self._put_record(kv, delta)
        except RecordError as err:
            with suppress(RecordError):
                self._delete(kv.key, delta)  # what stood there before is no longer true
            self.errors[kv.key] = str(err)

    def _put_record(self, kv: KV, delta: Delta) -> None:
        kind, number = self._split(kv.key)
        if kind == "spec" and kv.mod_revision != self.spec_rev:
            self.spec, self.spec_rev, delta.spec = records.decode(kv.value, KernelSpec), kv.mod_revision, True
            self.born = kv.create_revision
        elif kind == "epoch" and kv.mod_revision != self.epoch_rev:
            self.epoch, self.epoch_rev, delta.epoch = records.decode(kv.value, Epoch), kv.mod_revision, True
        elif kind == "checkpoint" and kv.mod_revision != self.checkpoint_rev:
            self.checkpoint, self.checkpoint_rev = records.decode(kv.value, Checkpoint), kv.mod_revision
            delta.checkpoint = True
        elif kind == "replicas":
            self._put_replica(number, records.decode(kv.value, ReplicaRecord), delta)
        elif kind == "claims":
            record = records.decode(kv.value, ClaimRecord)
            self._put_claim(number, Held(record, kv.mod_revision, kv.lease), delta)
        elif kind == "log" and self.log_revs.get(number) != kv.mod_revision:
            self._put_entry(kv, records.decode(kv.value, LogEntry), delta)

    def _split(self, key: str) -> tuple[str, int]:
        """Which record a key of this kernel is: `("log", 7)`, `("spec", -1)`."""
        kind, _, rest = key[len(self._prefix) :].partition("/")
        if kind not in ("replicas", "claims", "log"):
            return ("" if rest else kind), -1
        if not rest.isdecimal():
            raise RecordError(f"{key} does not end in a number")
        return kind, int(rest)

    def _put_replica(self, index: int, record: ReplicaRecord, delta: Delta) -> None:
        if self.replicas.get(index) != record:
            self.replicas[index] = record
            delta.replicas.add(index)

    def _put_claim(self, n: int, held: Held, delta: Delta) -> None:
        if self.claims.get(n) != held:
            self.claims[n] = held
            delta.claims.add(n)

    def _put_entry(self, kv: KV, entry: LogEntry, delta: Delta) -> None:
        n = number_of(kv.key)
        self.log[n], self.log_sizes[n], self.log_revs[n] = entry, weight(entry, len(kv.value)), kv.mod_revision
        delta.entries.append(entry)
        self.last = max(self.last, n)
        if entry.kind in ("origin", "reset"):
            self._executor = -1
        elif entry.replica >= 0:
            self._executor = entry.replica

    def _delete(self, key: str, delta: Delta) -> None:
        if self.errors.pop(key, None) is not None:
            return
        kind, n = self._split(key)
        if kind == "spec" and self.spec is not None:
            self.spec, self.spec_rev, delta.spec, delta.gone = None, 0, True, True
        elif kind == "epoch":
            self.epoch, self.epoch_rev, delta.epoch = None, 0, True
        elif kind == "checkpoint":
            self.checkpoint, self.checkpoint_rev, delta.checkpoint = None, 0, True
        elif kind == "replicas" and self.replicas.pop(n, None) is not None:
            delta.replicas.add(n)
        elif kind == "claims" and self.claims.pop(n, None) is not None:
            delta.claims.add(n)
        elif kind == "log":
            self.log.pop(n, None)
            self.log_sizes.pop(n, None)
            self.log_revs.pop(n, None)


class KernelViews:
    """The views of all kernels, from one watch of `keys.KERNELS`."""

    def __init__(self) -> None:
        self.views: dict[str, KernelView] = {}

    def apply(self, item: Snapshot | Changes) -> dict[str, Delta]:
        """What changed, by kernel. A kernel that was deleted is in the result once more (`gone`), then
        forgotten."""
        if isinstance(item, Snapshot):
            found: dict[str, list[KV]] = {k: [] for k in self.views}
            for kv in item.kvs:
                found.setdefault(kernel_of(kv.key), []).append(kv)
            deltas = {k: self._view(k).from_snapshot(kvs, item.revision) for k, kvs in found.items()}
        else:
            events: dict[str, list[Event]] = {}
            for event in item.events:
                events.setdefault(kernel_of(event.kv.key), []).append(event)
            deltas = {k: self._view(k).from_events(evs, item.revision) for k, evs in events.items()}
        for k in deltas:
            if self.views[k].empty:
                del self.views[k]
        return {k: delta for k, delta in deltas.items() if delta}

    def _view(self, kernel: str) -> KernelView:
        return self.views.setdefault(kernel, KernelView(kernel))


def kernel_of(key: str) -> str:
    """The kernel a key below `keys.KERNELS` belongs to."""
    return key[len(keys.KERNELS) :].partition("/")[0]
