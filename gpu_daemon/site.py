"""What the parts of one daemon share: its settings, etcd, lease, copies of the records, devices, replicas and tasks.

No part reaches into another's insides; they meet here. Everything belongs to the daemon's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from gpu_daemon.fleet import ReplicaId
from gpu_daemon.ledger import Ledger
from gpu_daemon.metrics.meters import Meters
from gpu_daemon.queue import FairQueue
from gpu_daemon.rundir import RunDir
from gpu_daemon.sizing import Sizing
from gpu_daemon.slicing.offers import Offers
from gpu_daemon.tiers import Policy
from nbos_cluster.etcd import Etcd, EtcdError, EtcdUnavailable, Lease, LeaseGone
from nbos_cluster.kernelview import KernelView, KernelViews
from nbos_cluster.kv import Txn, TxnResult

if TYPE_CHECKING:
    from gpu_daemon.blobdesk import BlobDesk
    from gpu_daemon.power.watching import PowerWatch
    from gpu_daemon.replica import LocalReplica

T = TypeVar("T")
log = logging.getLogger("gpu_daemon")

RETRY_FIRST = 0.1
RETRY_LAST = 1.0

RECOVERY = 2.0
"""Seconds that hosts have, after etcd is back, to claim again what they run."""

TELL_FIRST = 1.0
TELL_EVERY = 2.0


class Refused(RuntimeError):
    """A request is answered with `ok` false: nothing is broken. `code` is what the answer's `error` says,
    `fields` stand beside it."""

    def __init__(self, code: str, reason: str, fields: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.code, self.fields = code, fields or {}


@dataclass(frozen=True)
class Settings:
    """What was configured. address: what other hosts call this host. ip: what replicas bind to."""

    host: str
    run_dir: Path
    address: str = "127.0.0.1"
    ip: str = "127.0.0.1"
    lease_ttl: float = 3.0
    max_replicas: int = 64
    stop_replicas_on_exit: bool = True
    replica_command: tuple[str, ...] = ()
    blob_grace: float = 3600.0
    blob_patience: float = 45.0
    collect_every: float = 600.0
    accounts_days: int = 100
    allowed_slowdown: float = 0.0
    metrics_owners: bool = False
    giving_back: Policy = field(default_factory=Policy)
    gpu_on_touch: bool = True


@dataclass
class Site:
    settings: Settings
    etcd: Etcd
    ledger: Ledger
    queue: FairQueue
    blobs: BlobDesk
    rundir: RunDir
    offers: Offers = field(default_factory=Offers)
    sizing: Sizing = field(default_factory=Sizing)
    meters: Meters = field(default_factory=Meters)
    power: PowerWatch | None = None
    """Who sets the devices' clocks; None: nobody does."""
    views: KernelViews = field(default_factory=KernelViews)
    replicas: dict[ReplicaId, LocalReplica] = field(default_factory=dict)
    draining: bool = False
    stopping: bool = False
    away_since: float | None = None
    """Unix time since which etcd does not answer, for people; None while it does."""
    _away_at: float = 0.0
    """The same by the clock that nobody sets."""
    back_at: float = float("-inf")
    """When etcd answered again (`now`)."""
    lease: Lease | None = None
    synced: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the records have been read for the first time."""
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def host(self) -> str:
        return self.settings.host

    @property
    def lease_id(self) -> int:
        """Raises LeaseGone while there is none: what is put without a lease would stay for ever."""
        if self.lease is None or not self.lease.id:
            raise LeaseGone("this host's lease is being renewed")
        return self.lease.id

    def now(self) -> float:
        """Seconds of the monotonic clock that queue and fleet count in."""
        return time.monotonic()

    def view(self, kernel: str) -> KernelView | None:
        return self.views.views.get(kernel)

    def known(self, kernel: str) -> KernelView:
        """The kernel's records, with its spec. Raises Refused when it was deleted."""
        view = self.view(kernel)
        if view is None or view.spec is None:
            raise Refused("gone", f"kernel {kernel} is gone")
        return view

    # -- tasks --------------------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, T], what: str) -> asyncio.Task[T]:
        """Run in the background; a failure is logged with what it was doing, and never ends the daemon."""
        task = asyncio.create_task(work, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Refused):
            log.error("%s failed", task.get_name(), exc_info=error)

    async def cancel_tasks(self) -> None:
        tasks = [t for t in self._tasks if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- etcd ---------------------------------------------------------------------------------------------------------

    async def commit(self, txn: Txn) -> TxnResult:
        """Carry out one transaction. Raises EtcdUnavailable."""
        asked, began = time.time(), time.perf_counter()
        try:
            result = await self.etcd.txn(txn.compare, txn.success, txn.failure)
        except EtcdUnavailable:
            self.meters.etcd_failed()
            self.note_away(asked)
            raise
        self.meters.etcd_answered(time.perf_counter() - began)
        self.note_back()
        return result

    async def commit_for_sure(self, txn: Callable[[], Txn]) -> TxnResult:
        """Carry out a transaction, waiting for etcd for as long as it is away. `txn` is built anew for every try."""
        delay = RETRY_FIRST
        while True:
            try:
                return await self.commit(txn())
            except (EtcdUnavailable, EtcdError) as err:
                if isinstance(err, EtcdError) and not isinstance(err, LeaseGone):
                    log.error("etcd refused a transaction, it is tried again: %s", err)
                await asyncio.sleep(delay)
                delay = min(2 * delay, RETRY_LAST)

    @contextlib.contextmanager
    def telling(self, tell: Callable[[str], None]) -> Iterator[None]:
        """While the block waits for etcd: `tell` why, after a second and then every two."""
        loop, asked = asyncio.get_running_loop(), time.time()
        timer: asyncio.TimerHandle

        def say() -> None:
            nonlocal timer
            tell(self.trouble(asked))
            timer = loop.call_later(TELL_EVERY, say)

        timer = loop.call_later(TELL_FIRST, say)
        try:
            yield
        finally:
            timer.cancel()

    def trouble(self, asked: float) -> str:
        """Why a transaction that was asked for at `asked` (Unix time) is not carried out yet."""
        if self.away_since is None and (self.lease is None or not self.lease.id):
            return "this host's lease is being renewed"
        return self.away_text(asked)

    def note_away(self, since: float | None = None) -> None:
        if self.away_since is None:
            self.away_since = time.time() if since is None else since
            self._away_at = self.now()
            log.warning("etcd does not answer; running cells run on, new ones wait")

    def note_back(self) -> None:
        if self.away_since is not None:
            log.warning("etcd answers again after %.1f s", self.now() - self._away_at)
            self.meters.etcd_was_away(self.now() - self._away_at)
            self.away_since = None
            self.back_at = self.now()

    @property
    def cut_off(self) -> bool:
        """Whether etcd stood still (or was out of reach) just now, so that leases may have ended whose owners live."""
        lease, back_at = self.lease, self.back_at
        unsure = lease is not None and not lease.sure
        if lease is not None:
            back_at = max(back_at, lease.still_at)
        return unsure or self.away_since is not None or self.now() < back_at + RECOVERY

    def away_text(self, asked: float | None = None) -> str:
        """asked: when the question that has no answer was asked; it counts where nothing is known from before."""
        since = self.away_since or asked or time.time()
        return f"etcd is away since {time.strftime('%H:%M:%S', time.localtime(since))}"

    # -- waiting for the local copy -----------------------------------------------------------------------------------

    def notify(self) -> None:
        """The local copy of the records changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the local copy satisfies `condition`; False when it did not within `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition():
                    await self._changed.wait()
        return condition()


def plain(value: Any) -> Any:
    """A record as JSON types with every field in it (msgspec's own leaves out what has its default)."""
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value
