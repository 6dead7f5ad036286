"""Who holds which TPCs and how much memory of a host's devices: the grant ledger, without IO.

It guarantees promise 3 for its host: no TPC, device or byte of device memory is granted twice, and a grant that was
released is gone. Requests come in, a `GrantRecord` or a refusal goes out; the caller brings the time and the name of
the grant. `validate_state` spells the promise out; an illegal step raises `LedgerError` with the latest steps.

A whole device is exclusive. A slice takes the device with the least room that still suffices (best fit), so that whole
devices stay whole for as long as possible.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

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
    """What one execution asks for. `grant` is the name its grant will have."""

    grant: str
    owner: str
    kernel: str
    replica: int
    n: int
    resources: Resources


@dataclass
class _Book:
    """One device's accounts: the grant that holds each TPC, and the bytes each grant may use."""

    device: Device
    tpcs: dict[int, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def free_tpcs(self) -> int:
        return self.device.tpcs - len(self.tpcs)

    @property
    def free_memory(self) -> int:
        return self.device.memory - sum(self.memory.values())

    @property
    def idle(self) -> bool:
        return not self.tpcs and not self.memory


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
        self._books = {device.uuid: _Book(device) for device in devices}
        self._grants: dict[str, GrantRecord] = {}
        self._story: deque[str] = deque(maxlen=50)

    # -- what is held -------------------------------------------------------------------------------------------------

    @property
    def grants(self) -> dict[str, GrantRecord]:
        return dict(self._grants)

    @property
    def devices(self) -> list[Device]:
        return [book.device for book in self._books.values()]

    def weight(self, grant: GrantRecord) -> float:
        """How many devices' worth of TPCs the grant holds: half a device is 0.5."""
        return sum(len(s.tpcs) / self._books[s.uuid].device.tpcs for s in grant.shares if s.uuid in self._books)

    def copy(self) -> Ledger:
        """An independent ledger in the same state, to play out what would happen."""
        twin = Ledger(self.host)
        twin._books = {u: _Book(b.device, dict(b.tpcs), dict(b.memory)) for u, b in self._books.items()}
        twin._grants = dict(self._grants)
        return twin

    # -- questions ----------------------------------------------------------------------------------------------------

    def possible(self, resources: Resources) -> Impossible | None:
        """Why no wait would ever make room for `resources` on this host, or None when one would."""
        malformed = _malformed(resources)
        if malformed:
            return Impossible(malformed)
        if not resources.wants_gpu:
            return None
        books = [b for b in self._books.values() if b.device.healthy and _model_is(b.device, resources.model)]
        if not books:
            return Impossible(self._without_device(resources))
        ask = describe(resources)
        if resources.gpus > len(books):
            return Impossible(
                f"the cell asks for {ask}, host {self.host} has {len(books)}; ask for at most {len(books)}"
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
        return None

    def fit(self, resources: Resources, closed: Collection[str] = ()) -> Fit | Busy | Impossible:
        """The shares `resources` would get now. Devices named in `closed` are kept for somebody else."""
        impossible = self.possible(resources)
        if impossible:
            return impossible
        if not resources.wants_gpu:
            return Fit(())
        books = [
            b
            for u, b in self._books.items()
            if b.device.healthy and u not in closed and _model_is(b.device, resources.model)
        ]
        if resources.gpus:
            return self._fit_whole(resources, books)
        return self._fit_slice(resources, books)

    def drain_targets(self, resources: Resources) -> frozenset[str]:
        """The devices to keep free for a request that must wait: those that come closest to having room.

        While nobody new gets a part of them, the request's wait is bounded by what runs on them already.
        """
        if not resources.wants_gpu or self.possible(resources):
            return frozenset()
        books = [
            b
            for b in self._books.values()
            if b.device.healthy
            and _model_is(b.device, resources.model)
            and b.device.memory >= resources.memory
            and b.device.tpcs >= resources.tpcs
        ]
        books.sort(key=lambda b: (len(b.tpcs), b.device.index))
        return frozenset(b.device.uuid for b in books[: max(resources.gpus, 1)])

    # -- steps --------------------------------------------------------------------------------------------------------

    def reserve(self, request: Request, closed: Collection[str] = ()) -> GrantRecord | Busy | Impossible:
        """Take what the request asks for, or say why not. A second request under the same grant name is a mistake.

        The record has no time yet: this module knows no clock.
        """
        if request.grant in self._grants:
            raise self._error(f"grant {request.grant} is held already")
        fit = self.fit(request.resources, closed)
        if not isinstance(fit, Fit):
            return fit
        record = GrantRecord(
            grant=request.grant,
            host=self.host,
            owner=request.owner,
            kernel=request.kernel,
            replica=request.replica,
            n=request.n,
            shares=fit.shares,
        )
        self._enter(record)
        return record

    def restore(self, record: GrantRecord) -> Busy | None:
        """Enter a grant that was made before this daemon started. Refused when something else holds a part of it."""
        if record.grant in self._grants:
            return None
        for share in record.shares:
            book = self._books.get(share.uuid)
            if book is None:
                return Busy(f"device {share.uuid} of grant {record.grant} is not on host {self.host} any more")
            if any(t in book.tpcs or t >= book.device.tpcs for t in share.tpcs) or share.memory > book.free_memory:
                return Busy(f"a part of device {share.uuid} of grant {record.grant} is held by another grant")
        self._enter(record)
        return None

    def release(self, grant: str) -> GrantRecord | None:
        """Give a grant back; None when it was given back before (releasing twice is no mistake)."""
        record = self._grants.pop(grant, None)
        if record is None:
            return None
        self._story.append(f"release {grant}")
        for share in record.shares:
            book = self._books[share.uuid]
            for tpc in share.tpcs:
                if book.tpcs.pop(tpc, None) != grant:
                    raise self._error(f"TPC {tpc} of {share.uuid} was not held by {grant}")
            book.memory.pop(grant, None)
        return record

    def set_health(self, uuid: str, healthy: bool, reason: str = "") -> None:
        """A device failed or recovered. Its grants stand; nobody new gets a part of it while it is unhealthy."""
        book = self._books[uuid]
        book.device = msgspec.structs.replace(book.device, healthy=healthy, reason=reason)
        self._story.append(f"device {uuid} {'healthy' if healthy else 'unhealthy: ' + reason}")

    def validate_state(self) -> None:
        """Promise 3, spelt out. Raises LedgerError when it is broken."""
        for uuid, book in self._books.items():
            by_grants: dict[int, str] = {}
            for name, record in self._grants.items():
                for share in (s for s in record.shares if s.uuid == uuid):
                    for tpc in share.tpcs:
                        if tpc in by_grants or not 0 <= tpc < book.device.tpcs:
                            raise self._error(f"TPC {tpc} of {uuid} is granted twice or does not exist")
                        by_grants[tpc] = name
                    if share.whole and len(share.tpcs) != book.device.tpcs:
                        raise self._error(f"grant {name} holds {uuid} whole, but not all of its TPCs")
            if by_grants != book.tpcs:
                raise self._error(f"the accounts of {uuid} are not those of the grants")
            if not set(book.memory) <= set(self._grants) or book.free_memory < 0:
                raise self._error(f"memory of {uuid} is granted twice, or to nobody")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _enter(self, record: GrantRecord) -> None:
        self._story.append(f"grant {record.grant} to {record.kernel}/{record.replica} n={record.n}: {record.shares}")
        self._grants[record.grant] = record
        for share in record.shares:
            book = self._books[share.uuid]
            book.tpcs.update(dict.fromkeys(share.tpcs, record.grant))
            book.memory[record.grant] = share.memory

    def _fit_whole(self, resources: Resources, books: Sequence[_Book]) -> Fit | Busy:
        idle = [b for b in books if b.idle and b.device.memory >= resources.memory]
        if len(idle) < resources.gpus:
            count = sum(b.idle for b in self._books.values())
            return Busy(
                f"{describe(resources)} asked, {count} of {len(self._books)} GPUs of host {self.host} free"
                + self._users()
            )
        chosen = sorted(idle, key=lambda b: (b.device.memory, b.device.index))[: resources.gpus]
        return Fit(tuple(_whole(b.device, resources.memory) for b in sorted(chosen, key=lambda b: b.device.index)))

    def _fit_slice(self, resources: Resources, books: Sequence[_Book]) -> Fit | Busy:
        fitting = [b for b in books if b.free_tpcs >= resources.tpcs and b.free_memory >= share_of(b.device, resources)]
        if not fitting:
            free = max((b.free_tpcs for b in books), default=0)
            memory = max((b.free_memory for b in books), default=0)
            return Busy(
                f"{describe(resources)} asked, at most {free} TPCs and {memory / GIB:.1f} GiB of one GPU "
                f"of host {self.host} free" + self._users()
            )
        book = min(fitting, key=lambda b: (b.free_tpcs, b.device.index))
        tpcs = _choose_tpcs(book, resources.tpcs)
        return Fit((_share(book.device, tpcs, share_of(book.device, resources), whole=False),))

    def _users(self) -> str:
        count = len(self._grants)
        return f" ({count} cell{'s' if count != 1 else ''} running on its GPUs)" if count else ""

    def _without_device(self, resources: Resources) -> str:
        if not self._books:
            return (
                f"the cell asks for {describe(resources)}, host {self.host} has no GPU; run the cell with %%cpu, "
                "or start the kernel on a host with GPUs"
            )
        models = sorted({b.device.model for b in self._books.values() if b.device.healthy})
        has = f"has {', '.join(models)}" if models else "has no healthy GPU"
        return (
            f"the cell asks for {describe(resources)}, host {self.host} {has}; ask for one of these, or for any model"
        )

    def _error(self, what: str) -> LedgerError:
        return LedgerError(what + "\nlatest steps:\n  " + "\n  ".join(self._story))


def _malformed(resources: Resources) -> str:
    if min(resources.gpus, resources.tpcs, resources.memory) < 0:
        return f"the cell asks for a negative amount ({resources}); use 0 for nothing"
    if resources.gpus and resources.tpcs:
        return f"the cell asks for {resources.gpus} GPUs and {resources.tpcs} TPCs at once; ask for one of the two"
    return ""


def _model_is(device: Device, wanted: str) -> bool:
    return wanted.lower() in device.model.lower()


def share_of(device: Device, resources: Resources) -> int:
    """Bytes of `device` that the request means: named, or all of a whole device, or a slice's proportional share."""
    if resources.memory or resources.gpus:
        return resources.memory or device.memory
    return device.memory * resources.tpcs // max(device.tpcs, 1)


def _choose_tpcs(book: _Book, count: int) -> tuple[int, ...]:
    """The lowest free run of neighbours, since TPCs of one GPC share paths; scattered ones where there is no run."""
    free = [t for t in range(book.device.tpcs) if t not in book.tpcs]
    for i in range(len(free) - count + 1):
        if free[i + count - 1] - free[i] == count - 1:
            return tuple(free[i : i + count])
    return tuple(free[:count])


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
    )
