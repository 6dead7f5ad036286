"""Who holds which TPCs and how much memory of a host's devices: the grant ledger, without IO.

It guarantees promise 3 for its host: no TPC, device or byte of device memory is granted twice, and a grant that was
released is gone. A byte that a process still has after its grant (warm leftovers) is not granted to another replica.
Requests come in, a `GrantRecord` or a refusal goes out; the caller brings the time and the name of the grant.
`validate_state` spells the promise out; an illegal step raises `LedgerError` with the latest steps.

A whole device is exclusive. A slice takes the device with the least room that still suffices (best fit), so that whole
devices stay whole for as long as possible.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from gpu_daemon.book import Book, Holder, bits_of
from nbos_cluster.gpumodel import is_model
from nbos_cluster.records import Device, DeviceShare, GrantRecord, Resources

GIB = 1 << 30


class LedgerError(RuntimeError):
    """The ledger was asked for something impossible: a mistake of the caller, told with the latest steps."""


@dataclass(frozen=True)
class Busy:
    """No room now; waiting helps."""

    reason: str


@dataclass(frozen=True)
class Impossible:
    """No wait would help: the reason names the thing, the limit and the way out."""

    reason: str


@dataclass(frozen=True)
class Fit:
    """The shares that a request would get."""

    shares: tuple[DeviceShare, ...]


@dataclass(frozen=True)
class Request:
    """What one execution asks for. `grant` is the name its grant will have; groups: those of its owner. away: bytes
    that come back to the device before its first line, from host memory."""

    grant: str
    owner: str
    kernel: str
    replica: int
    n: int
    resources: Resources
    groups: tuple[str, ...] = ()
    borrow: int | None = None
    """TPCs beyond `resources` that the cell could use on loan; None: it keeps all that it gets until it ends."""
    away: int = 0

    @property
    def holder(self) -> Holder:
        return (self.kernel, self.replica)


@dataclass(frozen=True)
class Shortage:
    """What stands between a request and its room is memory that others' processes left: on `count` of these devices
    so many bytes."""

    count: int
    missing: Mapping[str, int]


NOBODY: Holder = ("", -1)
"""For questions about a request that is no replica's."""


Kept = Mapping[str, tuple[int, int]]
"""By device: how many TPCs and bytes of what is free are kept for somebody else (a reservation)."""

SHAPES = 4096
"""Shapes of requests that are remembered with the devices they fit on."""


def describe(resources: Resources) -> str:
    """`2 GPUs`, `16 TPCs with 20.0 GiB`, `a CPU only`: what is asked, for people."""
    if not resources.wants_gpu:
        return "a CPU only"
    what = f"{resources.gpus} GPU{'s' if resources.gpus > 1 else ''}" if resources.gpus else f"{resources.tpcs} TPCs"
    memory = f" with {resources.memory / GIB:.1f} GiB" if resources.memory else ""
    return what + memory + (f" of model {resources.model}" if resources.model else "")


class Ledger:
    """The accounts of one host. Not thread-safe: it belongs to the daemon's event loop."""

    def __init__(self, host: str, devices: Iterable[Device] = ()) -> None:
        self.host = host
        self._books = {device.uuid: Book(device) for device in sorted(devices, key=lambda d: d.index)}
        self._grants: dict[str, GrantRecord] = {}
        self._shapes: dict[Resources, list[Book] | Impossible] = {}
        self._memory: dict[Resources, int] = {}
        self.kinds = tuple({(b.device.memory, b.device.tpcs): b.device for b in self._books.values()}.values())
        """One device of each size."""
        self._ill = frozenset(uuid for uuid, book in self._books.items() if not book.device.healthy)
        self._story: deque[tuple[str, object]] = deque(maxlen=50)
        self._warm: dict[Holder, set[str]] = {}
        """The devices on which a replica's process has something."""
        self.stuck: set[Holder] = set()
        """Replicas whose processes do not give back what they left."""
        self.homes: dict[Holder, frozenset[str]] = {}
        """The devices that a replica's process can use: CUDA chooses once, when it starts; a checkpoint goes back to
        the same, or to another of its kind."""
        self._before: dict[str, dict[str, int]] = {}
        """What the replica's process had on the devices of a grant before that was given."""
        self._active: Counter[Holder] = Counter()
        """How many grants a replica has."""

    # -- what is held -------------------------------------------------------------------------------------------------

    @property
    def grants(self) -> dict[str, GrantRecord]:
        return dict(self._grants)

    def holds(self, grant: str) -> bool:
        return grant in self._grants

    def holds_any(self, holder: Holder) -> bool:
        """Whether the replica has a grant."""
        return self._active[holder] > 0

    @property
    def books(self) -> Collection[Book]:
        return self._books.values()

    @property
    def devices(self) -> list[Device]:
        return [book.device for book in self._books.values()]

    def weight(self, grant: GrantRecord) -> float:
        """How many devices' worth of TPCs the grant holds: half a device is 0.5."""
        return sum(len(s.tpcs) / self._books[s.uuid].device.tpcs for s in grant.shares if s.uuid in self._books)

    def copy(self) -> Ledger:
        """An independent ledger in the same state, to play out what would happen."""
        twin = Ledger(self.host)
        twin._books = {uuid: book.copy() for uuid, book in self._books.items()}
        twin.homes = dict(self.homes)
        twin._warm = {holder: set(uuids) for holder, uuids in self._warm.items()}
        twin._active = Counter(self._active)
        twin._grants, twin._ill, twin.stuck = dict(self._grants), self._ill, set(self.stuck)
        return twin

    def left(self, holder: Holder) -> dict[str, int]:
        """Bytes that the replica's process has, by device."""
        return {uuid: self._books[uuid].left[holder] for uuid in self._warm.get(holder, ())}

    @property
    def anything_left(self) -> bool:
        """Whether any process has something on a device after its grant."""
        return bool(self._warm)

    def particular(self, holder: Holder) -> bool:
        """Whether a device may do for this replica that does not for others, or the other way round."""
        return holder in self._warm or holder in self.homes

    # -- questions ----------------------------------------------------------------------------------------------------

    def possible(self, resources: Resources) -> Impossible | None:
        """Why no wait would ever make room for `resources` on this host, or None when one would."""
        found = self._suitable(resources)
        return found if isinstance(found, Impossible) else None

    def fit(
        self,
        resources: Resources,
        closed: Collection[str] = (),
        kept: Kept | None = None,
        holder: Holder = NOBODY,
        away: int = 0,
    ) -> Fit | Busy | Impossible:
        """The shares `resources` would get now, asked by `holder` whose process brings `away` bytes with it. Devices
        named in `closed`, and the parts in `kept`, are somebody else's."""
        books = self._suitable(resources)
        if isinstance(books, Impossible):
            return books
        if not resources.wants_gpu:
            return Fit(())
        if away > max(b.device.memory for b in books):
            return Impossible(
                f"this kernel's tensors wait in host memory and take {away / GIB:.1f} GiB, more than one GPU of host "
                f"{self.host} has; delete some in a cell without a GPU (%%cpu), or restart the kernel"
            )
        if closed or self._ill:
            books = [b for b in books if b.uuid not in closed and b.uuid not in self._ill]
        books = self._at_home(books, holder, resources)
        ask = _Ask(resources, holder, away)
        if resources.gpus:
            return self._fit_whole(ask, [b for b in books if b.uuid not in kept] if kept else books)
        return self._fit_slice(ask, books, kept or {})

    def shortage(self, request: Request, closed: Collection[str] = (), kept: Kept | None = None) -> Shortage | None:
        """The devices on which the request lacks nothing but memory that others' processes have after their grants,
        and how much; None where it lacks something else."""
        if not self._warm:
            return None
        books, kept, count = self._suitable(request.resources), kept or {}, max(request.resources.gpus, 1)
        if isinstance(books, Impossible) or not request.resources.wants_gpu:
            return None
        books = self._at_home(books, request.holder, request.resources)
        ask = _Ask(request.resources, request.holder, request.away)
        missing: dict[str, int] = {}
        for book in books:
            tpcs, memory = kept.get(book.uuid, (0, 0))
            if book.uuid in closed or book.uuid in self._ill:
                continue
            if book.holders if request.resources.gpus else book.free_tpcs - tpcs < request.resources.tpcs:
                continue
            lacks = ask.memory(book) + memory - book.room(ask.holder)
            if lacks <= 0:
                count -= 1
            elif lacks <= book.others_left(ask.holder):
                missing[book.uuid] = lacks
        return Shortage(count, missing) if 0 < count <= len(missing) else None

    def drain_targets(
        self, resources: Resources, kept: Kept | None = None, holder: Holder = NOBODY, away: int = 0
    ) -> frozenset[str]:
        """The devices to keep free for a request that must wait: those that come closest to having room, beside what is
        `kept`.

        While nobody new gets a part of them, the request's wait is bounded by what runs on them already.
        """
        books = self._suitable(resources)
        if not resources.wants_gpu or isinstance(books, Impossible):
            return frozenset()
        if kept:
            books = [b for b in books if b.device.tpcs - kept.get(b.uuid, (0, 0))[0] >= resources.tpcs]
            if resources.gpus:
                books = [b for b in books if b.uuid not in kept]
        books = self._at_home(books, holder, resources)
        ask = _Ask(resources, holder, away)
        nearest = sorted(
            books,
            key=lambda b: (
                b.uuid in self._ill,
                self._held_up(b, ask),
                b.used_tpcs,
                b.others_left(holder),
                b.device.index,
            ),
        )
        return frozenset(b.uuid for b in nearest[: max(resources.gpus, 1)])

    def _at_home(self, books: list[Book], holder: Holder, resources: Resources) -> list[Book]:
        """Those that its process can use. One that asks for more devices than those gets others, and is told there what
        it must do."""
        if holder not in self.homes:
            return books
        found = [b for b in books if b.uuid in self.homes[holder] and b.uuid not in self._ill]
        return found if len(found) >= max(resources.gpus, 1) else books

    def _held_up(self, book: Book, ask: _Ask) -> bool:
        """Whether what a process does not give back keeps the request off the device, however long it waits."""
        if not book.left or not self.stuck:
            return False
        stuck = sum(size for who, size in book.left.items() if who in self.stuck and who != ask.holder)
        return book.device.memory - stuck < ask.memory(book)

    def serves(self, resources: Resources, uuids: Collection[str], holder: Holder = NOBODY, away: int = 0) -> bool:
        """Whether these devices are well and, once nothing runs on them, what the request needs."""
        books = self._suitable(resources)
        if isinstance(books, Impossible) or len(uuids) < max(resources.gpus, 1) or not self._ill.isdisjoint(uuids):
            return False
        books = self._at_home(books, holder, resources)
        ask = _Ask(resources, holder, away)
        held_up = {b.uuid for b in books if b.uuid in uuids and self._held_up(b, ask)}
        # Where every device is held up by what does not come back, these are as good as others.
        if held_up and not all(self._held_up(b, ask) for b in books):
            return False
        return set(uuids) <= {b.uuid for b in books}

    def memory_of(self, resources: Resources) -> int:
        """The bytes that the request would get in all; of devices that differ, the most."""
        found = self._memory.get(resources)
        if found is None:
            books = self._suitable(resources)
            most = (
                0 if isinstance(books, Impossible) else max((share_of(b.device, resources) for b in books), default=0)
            )
            found = self._memory[resources] = most * max(resources.gpus, 1)
        return found

    def _suitable(self, resources: Resources) -> list[Book] | Impossible:
        """The devices that have room for `resources` when nothing runs on them (and that are well, or will be), by
        index; or why there is none."""
        found = self._shapes.get(resources)
        if found is None:
            if len(self._shapes) > SHAPES:
                self._forget_shapes()
            found = self._shapes[resources] = self._look_for(resources)
        return found

    def _forget_shapes(self) -> None:
        self._shapes.clear()
        self._memory.clear()

    def _look_for(self, resources: Resources) -> list[Book] | Impossible:
        malformed = _malformed(resources)
        if malformed:
            return Impossible(malformed)
        if not resources.wants_gpu:
            return []
        # A device whose trouble passes by itself is worth waiting for.
        well = [b for b in self._books.values() if b.device.healthy or b.device.passing]
        books = [b for b in well if _suits(b.device, resources)]
        if not books:
            return Impossible(self._without_device(resources))
        ask = describe(resources)
        if resources.gpus > len(books):
            return Impossible(
                f"the cell asks for {ask}, host {self.host} has {len(books)}; ask for at most {len(books)}"
                + self._out_of_use()
            )
        tpcs = max(b.device.tpcs for b in books)
        if resources.tpcs > tpcs:
            return Impossible(
                f"the cell asks for {ask}, a device of host {self.host} has {tpcs}; "
                f"ask for at most {tpcs} TPCs, or for whole GPUs"
            )
        big_enough = [b for b in books if b.device.memory >= resources.memory and b.device.tpcs >= resources.tpcs]
        if len(big_enough) < max(resources.gpus, 1):
            memory = max(b.device.memory for b in books)
            return Impossible(
                f"the cell asks for {ask}, a device of host {self.host} has {memory / GIB:.1f} GiB; ask for less memory"
            )
        return big_enough

    # -- steps --------------------------------------------------------------------------------------------------------

    def reserve(
        self, request: Request, closed: Collection[str] = (), kept: Kept | None = None
    ) -> GrantRecord | Busy | Impossible:
        """Take what the request asks for, or say why not. A second request under the same grant name is a mistake.

        The record has no time yet: this module knows no clock.
        """
        if request.grant in self._grants:
            raise self._error(f"grant {request.grant} is held already")
        fit = self.fit(request.resources, closed, kept, request.holder, request.away)
        return self._granted(request, fit.shares) if isinstance(fit, Fit) else fit

    def reserve_on(self, request: Request, book: Book, tpcs: int, memory: int) -> GrantRecord:
        """Take that much of one device: what a borrower keeps until its cell ends, which may be its memory alone."""
        if request.grant in self._grants or tpcs > book.free_tpcs or memory > book.room(request.holder):
            raise self._error(f"{tpcs} TPCs and {memory} bytes of {book.uuid} are not there for {request}")
        chosen = book.choose(tpcs) if tpcs else ()
        return self._granted(request, (_share(book.device, chosen, memory, whole=False),))

    def _granted(self, request: Request, shares: tuple[DeviceShare, ...]) -> GrantRecord:
        record = GrantRecord(
            grant=request.grant,
            host=self.host,
            owner=request.owner,
            kernel=request.kernel,
            replica=request.replica,
            n=request.n,
            shares=shares,
            groups=request.groups,
        )
        self._enter(record, request.away)
        return record

    def suitable(self, resources: Resources) -> list[Book]:
        """The devices that are well and have room for the request when nothing runs on them."""
        found = self._suitable(resources)
        return [] if isinstance(found, Impossible) else [b for b in found if b.uuid not in self._ill]

    def book(self, uuid: str) -> Book:
        return self._books[uuid]

    def restore(self, record: GrantRecord) -> Busy | None:
        """Enter a grant that was made before this daemon started. Refused when something else holds a part of it."""
        if record.grant in self._grants:
            return None
        for share in record.shares:
            book = self._books.get(share.uuid)
            if book is None:
                return Busy(f"device {share.uuid} of grant {record.grant} is not on host {self.host} any more")
            if not book.has_room_for(share, (record.kernel, record.replica)):
                return Busy(f"a part of device {share.uuid} of grant {record.grant} is held by another grant")
        self._enter(record)
        return None

    def release(self, grant: str, used: bool = True) -> GrantRecord | None:
        """Give a grant back; None when it was given back before (releasing twice is no mistake). What the process has
        then was told (`set_left`) before. used: false where nothing ran under the grant, so that nothing came to the
        device with it."""
        record = self._grants.pop(grant, None)
        if record is None:
            return None
        self._story.append(("release", grant))
        holder, before = (record.kernel, record.replica), self._before.pop(grant, {})
        self._active[holder] -= 1
        if not used and before:
            self.set_left(holder, {**self.left(holder), **before})
        for share in record.shares:
            if not self._books[share.uuid].leave(grant, share, holder):
                raise self._error(f"{share.uuid} was not held by {grant} as its record says")
        return record

    def set_left(self, holder: Holder, left: Mapping[str, int]) -> None:
        """What the replica's process has now: these bytes, and on other devices none."""
        self._story.append((f"{holder} has", dict(left)))
        for uuid, book in self._books.items():
            if left.get(uuid, 0) != book.left.get(holder, 0):
                self._set_left(book, holder, left.get(uuid, 0))

    def _set_left(self, book: Book, holder: Holder, size: int) -> None:
        book.set_left(holder, size)
        found = self._warm.setdefault(holder, set())
        found.add(book.uuid) if size > 0 else found.discard(book.uuid)
        if not found:
            del self._warm[holder]

    def set_health(self, uuid: str, healthy: bool, reason: str = "", passing: bool = False) -> None:
        """A device failed or recovered. Its grants stand; nobody new gets a part of it while it is unhealthy. passing:
        it is expected to recover by itself, so that cells wait for it."""
        book = self._books[uuid]
        book.device = msgspec.structs.replace(book.device, healthy=healthy, reason=reason, passing=passing)
        self._ill = frozenset(b.uuid for b in self._books.values() if not b.device.healthy)
        self._forget_shapes()
        self._story.append((f"device {uuid} is", "healthy" if healthy else f"unhealthy: {reason}"))

    def validate_state(self) -> None:
        """Promise 3, spelt out. Raises LedgerError when it is broken."""
        for uuid, book in self._books.items():
            taken, memory, holders = 0, dict(book.left), set()
            granted: dict[Holder, int] = {}
            for name, record in self._grants.items():
                for share in (s for s in record.shares if s.uuid == uuid):
                    bits = bits_of(share.tpcs)
                    if bits & taken or bits >> book.device.tpcs or bits.bit_count() != len(share.tpcs):
                        raise self._error(f"a TPC of {uuid} is granted twice (grant {name}) or does not exist")
                    if share.whole and len(share.tpcs) != book.device.tpcs:
                        raise self._error(f"grant {name} holds {uuid} whole, but not all of its TPCs")
                    taken, who = taken | bits, (record.kernel, record.replica)
                    granted[who] = granted.get(who, 0) + share.memory
                    holders.add(name)
            if any((uuid in uuids) != (who in book.left) for who, uuids in self._warm.items()):
                raise self._error(f"who has something on {uuid} was noted wrong")
            for who, size in granted.items():
                memory[who] = max(size, memory.get(who, 0))
            if holders != set(book.holders) or book.free != ((1 << book.device.tpcs) - 1) & ~taken:
                raise self._error(f"the accounts of {uuid} are not those of the grants")
            if (book.free_tpcs, book.free_memory) != (book.free.bit_count(), book.device.memory - sum(memory.values())):
                raise self._error(f"what is free of {uuid} was counted wrong")
            if sum(granted.values()) > book.device.memory:
                raise self._error(f"memory of {uuid} is granted twice")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _enter(self, record: GrantRecord, away: int = 0) -> None:
        self._story.append(("grant", record))
        self._grants[record.grant] = record
        holder = (record.kernel, record.replica)
        self._active[holder] += 1
        if away:
            self._before[record.grant] = {s.uuid: self._books[s.uuid].left.get(holder, 0) for s in record.shares}
        for share in record.shares:
            book = self._books[share.uuid]
            book.enter(record.grant, share, holder)
            if away:
                self._set_left(book, holder, away + book.left.get(holder, 0))

    def _fit_whole(self, ask: _Ask, books: Sequence[Book]) -> Fit | Busy:
        resources, holder = ask.resources, ask.holder
        idle = [b for b in books if not b.holders and ask.memory(b) <= b.room(holder)]
        if len(idle) < resources.gpus:
            suiting = [b for b in self._books.values() if _suits(b.device, resources)]
            count = sum(b.idle and b.device.healthy for b in suiting)
            such = "such " if len(suiting) < len(self._books) else ""
            return Busy(
                f"{describe(resources)} asked, {count} of {len(suiting)} {such}GPUs of host {self.host} free"
                + self._lacking(ask, [b for b in books if b.idle])
                + self._users()
                + self._out_of_use()
            )
        # First those on which its process has something already.
        chosen = sorted(idle, key=lambda b: (holder not in b.left, b.device.memory, b.device.index))[: resources.gpus]
        return Fit(tuple(_whole(b.device, resources.memory) for b in sorted(chosen, key=lambda b: b.device.index)))

    def _fit_slice(self, ask: _Ask, books: Sequence[Book], kept: Kept) -> Fit | Busy:
        resources, tpcs, best, least = ask.resources, ask.resources.tpcs, None, 1 << 62
        for book in books:  # by index, so that of equals the first is taken
            free = book.free_tpcs if ask.holder not in book.left else -1  # where its process is already
            if free < least and tpcs <= book.free_tpcs and _leaves(book, ask, kept.get(book.uuid)):
                best, least = book, free
        if best is None:
            free = max((b.free_tpcs for b in books), default=0)
            memory = max((b.room(ask.holder) for b in books), default=0)
            return Busy(
                f"{describe(resources)} asked, at most {free} TPCs and {max(memory, 0) / GIB:.1f} GiB of one GPU "
                f"of host {self.host} free"
                + self._lacking(ask, [b for b in books if b.free_tpcs >= tpcs])
                + self._users()
                + self._out_of_use()
            )
        return Fit((_share(best.device, best.choose(tpcs), share_of(best.device, resources), whole=False),))

    def _lacking(self, ask: _Ask, books: Sequence[Book]) -> str:
        """Of devices that have the TPCs: what others' processes left on the one that is nearest."""
        found = [(ask.memory(b) - b.room(ask.holder), b.device.index, b) for b in books]
        short = [one for one in found if 0 < one[0] <= one[2].others_left(ask.holder)]
        if not short:
            return ""
        lacks, index, book = min(short, key=lambda one: one[:2])
        others = [who for who in book.left if who != ask.holder]
        whose = "an idle notebook" if len(others) == 1 else f"{len(others)} idle notebooks"
        verb = "does not give back" if self.stuck.issuperset(others) else "left there and may give back"
        return f"; it waits for {lacks / GIB:.1f} GiB of GPU {index} that {whose} {verb}"

    def _users(self) -> str:
        count = len(self._grants)
        return f" ({count} cell{'s' if count != 1 else ''} running on its GPUs)" if count else ""

    def _without_device(self, resources: Resources) -> str:
        if not self._books:
            return (
                f"the cell asks for {describe(resources)}, host {self.host} has no GPU; run the cell with %%cpu, "
                "or start the kernel on a host with GPUs"
            )
        well = [b.device for b in self._books.values() if b.device.healthy or b.device.passing]
        asked = f"the cell asks for {describe(resources)}, host {self.host}"
        if not well:
            return f"{asked} has no healthy GPU{self._out_of_use()}"
        models = ", ".join(sorted({device.model for device in well}))
        if resources.gpus > 1 and any(is_model(device.model, resources.model) for device in well):
            return f"{asked} has {models}: instances of MIG, of which a cell can use one; ask for 1 GPU"
        return f"{asked} has {models}; ask for one of these, or for any model{self._out_of_use()}"

    def _out_of_use(self) -> str:
        """Which devices nobody gets, and why: it may be what a cell waits for."""
        ill = [b.device for b in self._books.values() if not b.device.healthy]
        told = "; ".join(f"GPU {d.index} ({d.model}) is out of use: {d.reason or 'not healthy'}" for d in ill[:4])
        more = f"; and {len(ill) - 4} more" if len(ill) > 4 else ""
        return f"; {told}{more}" if ill else ""

    def _error(self, what: str) -> LedgerError:
        return LedgerError(what + "\nlatest steps:\n  " + "\n  ".join(f"{did} {it}" for did, it in self._story))


def _malformed(resources: Resources) -> str:
    if min(resources.gpus, resources.tpcs, resources.memory) < 0:
        return f"the cell asks for a negative amount ({resources}); use 0 for nothing"
    if resources.gpus and resources.tpcs:
        return f"the cell asks for {resources.gpus} GPUs and {resources.tpcs} TPCs at once; ask for one of the two"
    return ""


def _suits(device: Device, resources: Resources) -> bool:
    """Of the model asked for; and a process can use one MIG instance at most."""
    return is_model(device.model, resources.model) and not (device.parent and resources.gpus > 1)


def share_of(device: Device, resources: Resources) -> int:
    """Bytes of `device` that the request means: named, or all of a whole device, or a slice's proportional share."""
    if resources.memory or resources.gpus:
        return resources.memory or device.memory
    return device.memory * resources.tpcs // max(device.tpcs, 1)


@dataclass(frozen=True)
class _Ask:
    """Who asks for what. away: bytes that its process brings with it, so that it takes at least those, and what it has
    there already."""

    resources: Resources
    holder: Holder
    away: int

    def memory(self, book: Book) -> int:
        share = share_of(book.device, self.resources)
        return max(share, self.away + book.left.get(self.holder, 0)) if self.away else share


def _leaves(book: Book, ask: _Ask, kept: tuple[int, int] | None) -> bool:
    """Whether the slice fits beside what is kept. Its TPCs alone are known to fit."""
    tpcs, memory = kept or (0, 0)
    return book.free_tpcs - tpcs >= ask.resources.tpcs and book.room(ask.holder) - memory >= ask.memory(book)


def _whole(device: Device, memory: int) -> DeviceShare:
    return _share(device, tuple(range(device.tpcs)), memory or device.memory, whole=True)


def _share(device: Device, tpcs: tuple[int, ...], memory: int, whole: bool) -> DeviceShare:
    return DeviceShare(
        uuid=device.uuid,
        index=device.index,
        model=device.model,
        tpcs=tpcs,
        memory=memory,
        whole=whole,
        kind=device.kind,
        of=device.tpcs,
    )
