"""One host's daemon: its parts put together, the watch that feeds them, its lease, its start and its end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import psutil

from gpu_daemon.accounting import Accounting
from gpu_daemon.answers import Answers
from gpu_daemon.aside import aside
from gpu_daemon.bidding import Bidding
from gpu_daemon.blobdesk import BlobDesk
from gpu_daemon.blobs import BlobStore
from gpu_daemon.checkpoint.freezer import Freezer
from gpu_daemon.collector import Collector
from gpu_daemon.commits import Commits
from gpu_daemon.expecting import follow_expected
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.health import HealthWatch, Watched
from gpu_daemon.ledger import Ledger
from gpu_daemon.lender import Terms
from gpu_daemon.metrics.exposition import Exposition
from gpu_daemon.metrics.meters import Meters
from gpu_daemon.order import Policy
from gpu_daemon.power.watching import PowerWatch
from gpu_daemon.publishing import Publisher
from gpu_daemon.queue import FairQueue
from gpu_daemon.replicas import Replicas
from gpu_daemon.rundir import RunDir
from gpu_daemon.runtime import ReplicaRuntime
from gpu_daemon.site import Settings, Site, log
from gpu_daemon.sizing import Sizing
from gpu_daemon.slicing.offers import Offers
from gpu_daemon.watchdog.watching import GPUWatch
from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd, EtcdError, EtcdUnavailable, Lease
from nbos_cluster.kernelview import Delta
from nbos_cluster.kv import Compare, Event, Snapshot, Txn, mod_is, op_delete
from nbos_cluster.records import Device, GrantRecord, HostRecord

STOP_WITHIN = 2.0
"""Seconds that replicas have to go when the daemon is told to stop."""


class Daemon:
    """Not started until `run`. etcd need not answer yet; the daemon waits for it.

    watched: how real devices are looked after. offers: what holds slices of them; None where there are no real ones.
    policy: who is owed what; raises SharesError or ReservationError where that is more than the devices have.
    watch: looks after what processes do on the devices; None: nobody does. terms: of loans. power: sets the devices'
    clocks. restore: resets, at the start, clocks that the daemon before has left locked in this run directory.
    freezer: checkpoints processes that others need the memory of; None: nobody does.
    """

    def __init__(
        self,
        settings: Settings,
        etcd: Etcd,
        devices: tuple[Device, ...],
        blobs: BlobStore,
        runtime: ReplicaRuntime,
        watched: Watched | None = None,
        offers: Offers | None = None,
        policy: Policy | None = None,
        watch: GPUWatch | None = None,
        terms: Terms | None = None,
        power: PowerWatch | None = None,
        restore: Callable[[Path], None] | None = None,
        freezer: Freezer | None = None,
    ) -> None:
        policy = policy or Policy()
        ledger = Ledger(settings.host, devices)
        rundir = RunDir(settings.run_dir)
        meters = Meters(settings.metrics_owners)
        desk = BlobDesk(blobs, settings.blob_grace, settings.blob_patience, meters)
        policy.shares.check(settings.host, devices)
        for reservation in policy.reservations:
            reservation.check(settings.host, devices)
        queue = FairQueue(ledger, policy, wall=time.time() - time.monotonic())
        sizing = Sizing(settings.allowed_slowdown, rundir.path / "rightsizing.json")
        self._site = Site(settings, etcd, ledger, queue, desk, rundir, offers or Offers(), sizing, meters)
        self._devices = devices
        self._publisher = Publisher(self._site)
        self._accounting = Accounting(self._site, settings.accounts_days)
        self._bidding = Bidding(self._site, self._publisher, self._accounting, terms)
        self._commits = Commits(self._site, self._bidding)
        self._runtime = runtime
        runtime.changed = self._warm_changed
        self._replicas = Replicas(self._site, runtime, self._commits, self._publisher)
        self._replicas.answer = Answers(
            self._site, self._bidding, self._commits, self._replicas.heard, self._replicas.progressed
        )
        self._driver = watched.driver if watched is not None else ""
        self._health = HealthWatch(self._site, watched or Watched(), self._health_changed, self._looked)
        self._watch = watch
        self._freezer = freezer
        self._bidding.giving.changed = self._left_changed
        if watch is not None:
            watch.measured = self._bidding.giving.measured
            self._bidding.giving.pids = watch.pids
        self._site.power, self._restore = power, restore
        if power is not None:
            power.changed = self._clocks_changed
        self.metrics = Exposition(self._site, self._bidding.waits)
        self._lease = 0
        self._since = time.time()
        self._host_rev: int | None = None
        """Revision of this host's record as the watch saw it last, 0 while there is none; None: not seen yet."""
        self._telling: asyncio.TimerHandle | None = None
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Ask `run` to end (SIGTERM, Ctrl-C)."""
        self._stop.set()

    async def run(self) -> None:
        """Until `stop`. Raises RunDirError when the run directory cannot be used, RuntimeFailed when no replica can
        be run here."""
        site = self._site
        site.rundir.open()
        if trouble := site.sizing.load():
            log.warning("%s", trouble)
        if self._restore is not None:
            await aside(lambda: self._restore and self._restore(site.rundir.path), "restoring clocks")
        await self._runtime.open()
        self._health.remember()
        await site.etcd.connect()
        log.info("host %s: %s", site.host, ", ".join(f"{d.model} ({d.kind})" for d in self._devices) or "no GPU")
        try:
            await self._accounting.open()
            self._bidding.lend_on(site.offers.lendable(self._devices))
            await self._replicas.find_again()
            self._accounting.resume()
            work = site.spawn(self._work(), "the daemon's start")
            stop = asyncio.create_task(self._stop.wait())
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not work.cancelled():
                work.result()
            await stop
        finally:
            await self._end()

    async def _work(self) -> None:
        await self._get_lease()
        self._site.spawn(self._publisher.run(), "writing records")
        self._site.spawn(self._accounting.run(), "accounting")
        self._site.spawn(self._watch_kernels(), "watching kernels")
        self._site.spawn(self._watch_host(), "watching this host's record")
        if self._runtime.expects:
            self._site.spawn(follow_expected(self._site.etcd, self._runtime.expect), "watching who is expected")
        collector = Collector(self._site, self._site.settings.blob_grace, self._site.settings.collect_every)
        self._site.spawn(collector.run(), "collecting blobs")
        self._site.spawn(self._health.run(), "watching the GPUs' health")
        if self._watch is not None:
            self._site.spawn(self._watch.run(self._site), "watching what processes do on the GPUs")
        if self._site.power is not None:
            self._site.spawn(self._site.power.run(self._site), "setting the GPUs' clocks")
        self._site.spawn(self._bidding.giving.open(self._freezer), "looking whether the driver can checkpoint")
        self._site.spawn(self._site.offers.watch(self._offers_changed), "looking at what holds slices")

    async def _end(self) -> None:
        site = self._site
        site.stopping = True
        self._bidding.stop()
        stop_replicas = site.settings.stop_replicas_on_exit
        if stop_replicas:
            await self._replicas.stop_all(STOP_WITHIN)
        await site.cancel_tasks()
        if site.power is not None:
            await site.power.close()
        await self._accounting.close()
        if self._freezer is not None:
            await self._freezer.checkpoints.close()
        await self._runtime.close()
        site.blobs.close()
        if site.lease is not None:
            try:
                async with asyncio.timeout(0.5):
                    await site.lease.stop(revoke=stop_replicas)
            except (TimeoutError, EtcdUnavailable, EtcdError) as err:
                log.warning("the lease ends by itself: %s", err)
        await site.etcd.close()
        site.sizing.save()
        site.rundir.close()

    # -- lease --------------------------------------------------------------------------------------------------------

    async def _get_lease(self) -> None:
        """Take up the lease of before a restart while it is alive; else a new one. Waits for etcd."""
        site = self._site
        saved = site.rundir.load_lease()
        site.lease = Lease(site.etcd, site.settings.lease_ttl, saved, self._lease_is_new)
        while True:
            try:
                await site.lease.start()
                site.note_back()
                return
            except (EtcdUnavailable, EtcdError) as err:
                site.note_away()
                log.debug("no lease yet: %s", err)
                await asyncio.sleep(0.3)

    async def _lease_is_new(self, lease: int) -> None:
        """Called by the lease. Returns at once: while it waits, nobody keeps the lease alive."""
        if self._lease not in (0, lease):
            self._site.meters.lease_lost()
        self._lease = lease
        self._site.rundir.save_lease(lease)
        self._publisher.write_all_again()
        self._site.spawn(self._commits.lease_is_new(), "claiming again what runs")

    def _health_changed(self) -> None:
        self._accounting.readings(self._health.readings)
        self._publish_host()
        self._bidding.room_changed()

    def _offers_changed(self) -> None:
        self._bidding.lend_on(self._site.offers.lendable(self._devices))
        self._publish_host()

    def _looked(self) -> None:
        self._accounting.readings(self._health.readings)
        self._publish_host(urgent=False)

    def _clocks_changed(self) -> None:
        self._site.meters.clocks_switched()
        if self._host_rev is not None and not self._site.stopping:
            self._publish_host(urgent=False)

    def _warm_changed(self) -> None:
        # Before the first look at the host's record it is not ours to write.
        if self._host_rev is not None and not self._site.stopping:
            self._publish_host(urgent=False)

    def _left_changed(self) -> None:
        """Once for all that changes within a second, since each cell may leave something else."""
        if self._host_rev is not None and not self._site.stopping and self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(1.0, self._tell_left)

    def _tell_left(self) -> None:
        self._telling = None
        if not self._site.stopping:
            self._publish_host(urgent=False)

    def _publish_host(self, urgent: bool = True) -> None:
        site = self._site
        record = HostRecord(
            name=site.host,
            address=site.settings.address,
            pid=os.getpid(),
            devices=site.offers.published(site.ledger.devices),
            cpus=os.cpu_count() or 0,
            memory=psutil.virtual_memory().total,
            max_replicas=site.settings.max_replicas,
            version=_version(),
            draining=site.draining,
            since=self._since,
            driver=self._driver,
            readings=self._health.readings,
            closed=self._health.closed,
            reopened=self._health.reopened,
            warm=self._runtime.warm(),
            left=self._bidding.giving.leftovers(),
            clocks=site.power.caps() if site.power is not None else {},
        )
        self._publisher.put(keys.host(site.host), record, urgent, guard=self._host_as_seen)

    def _host_as_seen(self) -> Sequence[Compare] | None:
        """Never write over a `draining` that somebody set and we have not seen."""
        return None if self._host_rev is None else [mod_is(keys.host(self._site.host), self._host_rev)]

    # -- watching -----------------------------------------------------------------------------------------------------

    async def _watch_kernels(self) -> None:
        """One watch of all kernels: on a cluster of a few dozen hosts cheaper than one watch for each kernel here, and
        a new kernel needs no second look-up. A cluster of thousands of kernels wants one watch per placed kernel."""
        site = self._site
        async for item in site.etcd.watch(keys.KERNELS):
            site.note_back()
            deltas = site.views.apply(item)
            if not site.synced.is_set():
                # What must not run here any more goes first, and makes room.
                self._replicas.remove_unwanted()
            for kernel, delta in deltas.items():
                self._kernel_changed(kernel, delta)
            if not site.synced.is_set():
                site.synced.set()
                self._look_around()
            site.notify()

    def _kernel_changed(self, kernel: str, delta: Delta) -> None:
        view = self._site.view(kernel)
        if view is not None:
            self._bidding.kernel_changed(view)
        if delta.spec or delta.epoch or delta.replicas or view is None:
            self._replicas.kernel_changed(kernel, view)
        if delta.entries or delta.checkpoint:
            self._replicas.log_changed(kernel)

    def _look_around(self) -> None:
        """Once, when the records have been read for the first time."""
        site = self._site
        for id in {id.kernel for id in site.replicas}:
            self._replicas.kernel_changed(id, site.view(id))
        for kernel, view in site.views.views.items():
            for n, held in list(view.claims.items()):
                replica = site.replicas.get(ReplicaId(kernel, held.record.replica))
                if held.record.host == site.host and (replica is None or replica.handle is None):
                    reason = f"replica {held.record.replica} on host {site.host} ended while the host's daemon was away"
                    incarnation = view.epoch.incarnation if view.epoch is not None else 1
                    work = self._commits.abandon(kernel, n, held.token, reason, None, incarnation)
                    site.spawn(work, f"abandoning execution {n} of kernel {kernel}")
        site.spawn(self._delete_strays(), "deleting records that nobody needs")

    async def _delete_strays(self) -> None:
        """What stands under a resumed lease for nobody: grants of replicas that are gone, tickets of before."""
        site = self._site
        tickets, _ = await site.etcd.range(keys.queue(site.host))
        strays = [kv for kv in tickets if kv.key.rpartition("/")[2] not in self._bidding.room.told]
        found, _ = await site.etcd.range(keys.grants(site.host))
        strays += [kv for kv in found if records.decode(kv.value, GrantRecord).grant not in site.ledger.grants]
        for kv in strays:
            await site.commit(Txn([mod_is(kv.key, kv.mod_revision)], [op_delete(kv.key)]))

    async def _watch_host(self) -> None:
        """Somebody may set `draining`, `closed` and `reopened` in this host's record; we obey and keep them."""
        key = keys.host(self._site.host)
        async for item in self._site.etcd.watch(key):
            if isinstance(item, Snapshot):
                self._host_rev = 0
                events = [Event("put", kv) for kv in item.kvs]
            else:
                events = list(item.events)
            for event in events:
                if event.kv.key != key:  # its grants, and hosts whose names begin with this one's
                    continue
                self._host_rev = event.kv.mod_revision if event.kind == "put" else 0
                if event.kind == "put":
                    self._obey(records.decode(event.kv.value, HostRecord))
            if isinstance(item, Snapshot):
                self._publish_host()

    def _obey(self, record: HostRecord) -> None:
        self._health.obey(record.closed, record.reopened)
        if record.draining != self._site.draining:
            self._site.draining = record.draining
            log.info("host %s %s", self._site.host, "drains" if record.draining else "does not drain any more")
            self._publish_host()


def _version() -> str:
    try:
        return metadata.version("nbos")
    except metadata.PackageNotFoundError:
        return ""
