"""Accounting: follows the grants, writes the journal every second while one is open, and puts the hours into etcd.

Guarantees: a daemon that is killed has accounted its grants until a second before; those that live on are accounted
without a gap when it is back, those that ended meanwhile until the last moment known. The journal is the truth; etcd
holds a copy, hour by hour, for the gateway (docs/sharing.md).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable

from gpu_daemon.accounts import HOUR, Accounts
from gpu_daemon.journal import Change, Journal
from gpu_daemon.site import Site, log
from gpu_daemon.timeofday import TimeOfDay
from gpu_daemon.use import DAY
from nbos_cluster import keys, records
from nbos_cluster.etcd import EtcdError, EtcdUnavailable
from nbos_cluster.kv import Txn, op_delete_range, op_put
from nbos_cluster.records import GrantRecord, HourRecord, Reading

EVERY = 1.0
GATHER = 0.05
PUBLISH_EVERY = 5.0
PUBLISH_WITHIN = 5.0
AT_THE_END = 0.5
"""Seconds for the last copy into etcd, which may be going down with us; the next daemon makes up for it."""
CLOSE_WITHIN = 2.0


class Accounting:
    """kept_days: how long an hour stays in etcd. wall: the clock (Unix seconds); steady: one that nobody sets."""

    def __init__(
        self,
        site: Site,
        kept_days: int,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._site, self._kept_days, self._clock = site, kept_days, TimeOfDay(wall, steady)
        self._accounts = Accounts(site.ledger.devices)
        self._journal = Journal(site.rundir.path / "accounts.db")
        self._name = ""
        self._left: dict[str, tuple[GrantRecord, float]] = {}
        """Grants that were open when the last daemon ended."""
        self._unpublished: set[int] = set()
        self._pruned = float("-inf")
        self._changes: list[Change] = []
        self._wake = asyncio.Event()
        self._said = ""

    # -- grants -------------------------------------------------------------------------------------------------------

    def begin(self, record: GrantRecord) -> None:
        now = self._wall()
        self._accounts.begin(record, now)
        self._note(Change(begun=record, at=now))
        self._wake.set()

    def change(self, record: GrantRecord) -> None:
        """An open grant holds other TPCs from now on. All are settled first: what a device draws is shared anew."""
        self._settle()
        now = self._wall()
        if self._accounts.holds(record.grant):
            lines = self._accounts.change(record, now)
            self._note(Change(lines, begun=record, at=now))
            self._unpublished |= {line.hour for line in lines}

    def end(self, grant: str, used: bool) -> None:
        lines = self._accounts.end(grant, self._wall(), used)
        if lines:
            self._note(Change(lines, ended=grant))
            self._unpublished |= {line.hour for line in lines}

    def readings(self, readings: Iterable[Reading]) -> None:
        """The devices were looked at. An instance of MIG tells its whole GPU's power, which nobody can share out."""
        self._settle()
        whole = {device.uuid for device in self._site.ledger.devices if not device.parent}
        self._accounts.power({r.uuid: float(r.power) for r in readings if r.power >= 0 and r.uuid in whole})

    # -- start, work, end ---------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Before replicas are found again. The fair share remembers the last day."""
        known = await asyncio.to_thread(self._journal.open)
        self._name, self._unpublished = known.journal, set(known.unpublished)
        self._left = {record.grant: (record, at) for record, at in known.open}
        now, wall = self._site.now(), self._wall()
        last = int(wall // HOUR)
        for line in await self._journal.lines(last - int(DAY // HOUR), last + 1):
            middle = min((line.hour + 0.5) * HOUR, wall)
            self._site.queue.remember_use(line.owner, line.device_seconds, now - (wall - middle), now)

    def resume(self) -> None:
        """When the replicas of before were found again, with their grants."""
        held = self._site.queue.grants
        for grant, record in held.items():
            at = self._left[grant][1] if grant in self._left else record.since or self._wall()
            self._accounts.begin(record, at)
            self._note(Change(begun=record, at=at))
        for grant in set(self._left) - set(held):
            log.info("grant %s ended while this daemon was away; it is accounted until the last moment known", grant)
            self._note(Change(ended=grant))
        self._left = {}
        self._wake.set()

    async def run(self) -> None:
        """For as long as the daemon lives. Sleeps while nothing is granted and everything is published."""
        published = float("-inf")
        while True:
            self._settle()
            if self._site.now() - published >= PUBLISH_EVERY:
                published = self._site.now()
                await self._publish(PUBLISH_WITHIN)
            if not len(self._accounts) and not self._unpublished:
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(EVERY)

    async def close(self) -> None:
        """What is open stays open in the journal: replicas may live on."""
        if self._journal.works:
            self._settle()
            self._write()
            await self._publish(AT_THE_END)
            await self._journal.close(CLOSE_WITHIN)

    def _wall(self) -> float:
        """Now. Where the clock was set meanwhile, open grants go on from the new time."""
        now, step = self._clock.look()
        if step:
            log.warning("this host's clock was set by %+.0f s; what is in use is accounted without that", step)
            self._accounts.clock_set(step)
            left = self._accounts.open()
            for record, at in left:
                self._note(Change(begun=record, at=at))
            # Of before the step, it may lie ahead of all that comes.
            self._note(Change(settled=min((at for _, at in left), default=now)))
        return now

    def _settle(self) -> None:
        if len(self._accounts):
            now = self._wall()
            lines = self._accounts.settle(now)
            self._note(Change(lines, settled=now))
            self._unpublished |= {line.hour for line in lines}

    def _note(self, change: Change) -> None:
        """Changes gather for a moment: waking the thread costs more than all of the accounting, and a bid waits."""
        self._changes.append(change)
        if len(self._changes) == 1:
            asyncio.get_running_loop().call_later(GATHER, self._write)

    def _write(self) -> None:
        changes, self._changes = self._changes, []
        if changes:
            self._journal.write(changes)

    # -- etcd ---------------------------------------------------------------------------------------------------------

    async def _publish(self, within: float) -> None:
        try:
            async with asyncio.timeout(within):
                for hour in sorted(self._unpublished):
                    await self._publish_hour(hour)
                await self._prune()
        except (EtcdUnavailable, EtcdError, TimeoutError, sqlite3.Error) as err:
            known = isinstance(err, EtcdUnavailable | TimeoutError) or str(err) == self._said
            log.log(logging.DEBUG if known else logging.ERROR, "the accounts cannot be put into etcd yet: %s", err)
            self._said = str(err)

    async def _publish_hour(self, hour: int) -> None:
        self._unpublished.discard(hour)
        self._write()
        try:
            lines = await self._journal.lines(hour, hour + 1)
            record = HourRecord(host=self._site.host, lines=tuple(lines))
            key = keys.account(self._site.host, hour, self._name)
            await self._site.commit(Txn([], [op_put(key, records.encode(record))]))
            if hour not in self._unpublished:
                await self._journal.published(hour)
        except BaseException:
            self._unpublished.add(hour)
            raise

    async def _prune(self) -> None:
        """Once a day: hours that etcd need not keep any longer. The journal keeps them."""
        if self._site.now() - self._pruned < DAY:
            return
        first = int(self._wall() // HOUR) - 24 * self._kept_days
        host = self._site.host
        old = op_delete_range(keys.accounts(host), keys.account_hour(host, max(0, first)))
        await self._site.commit(Txn([], [old]))
        self._pruned = self._site.now()
