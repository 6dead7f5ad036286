"""The hands of lending: what `loans` decided is written down, accounted, and told to the replicas that borrow.

Guarantees: a grant's record (in the run directory, for the next daemon) names a TPC before its cell may be on it, and
until that has said that it is off it; of two records none names a TPC of the other's, whenever this process is killed.
A replica is told what it should be on, not what changed: so it may be told twice, and is told again whenever it
connects. Who does not give back goes up the watchdog's ladder: it is warned, interrupted, restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from gpu_daemon.accounting import Accounting
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.loans import Reslice
from gpu_daemon.replica import LocalReplica
from gpu_daemon.site import Site, log
from gpu_daemon.transactions import grant_key
from gpu_daemon.watchdog.policy import STAGES, Act
from gpu_daemon.watchdog.watching import carry_out
from nbos_cluster import records
from nbos_cluster.kv import Txn, lease_is, op_put
from nbos_cluster.records import GrantRecord

AGAIN = 1.0
"""Seconds until what the disk did not take is tried again."""

Stage = Literal["ignore", "warn", "interrupt", "restart"]


@dataclass(frozen=True)
class Terms:
    """What borrowers are told. within: seconds to the end of a step, before the cell is stopped between two lines.
    patience: seconds until it is late, and between the stages after that. late: the last of them."""

    within: float = 0.5
    patience: float = 10.0
    late: Stage = "restart"


class Lender:
    """pending: the grant of a bid whose claim is being made: nothing runs on it yet. gave: called when such a one, told
    to give back, has done so by that."""

    def __init__(
        self,
        site: Site,
        accounting: Accounting,
        terms: Terms,
        pending: Callable[[ReplicaId], GrantRecord | None],
        changed: Callable[[ReplicaId, GrantRecord], None],
        gave: Callable[[str, int], None],
    ) -> None:
        self._site, self._accounting, self._terms = site, accounting, terms
        self._pending, self._changed, self._gave = pending, changed, gave
        self._recalled: dict[str, float] = {}
        """Since when each grant has something to give back."""
        self._late: dict[str, asyncio.TimerHandle] = {}
        self._publishing: dict[str, GrantRecord] = {}

    def reslice(self, step: Reslice) -> None:
        """A grant holds other TPCs, or its cell is to be on others. Raises OSError, having done nothing, where that
        cannot be noted."""
        id = ReplicaId(step.grant.kernel, step.grant.replica)
        replica, waiting = self._site.replicas.get(id), self._pending(id)
        in_flight = waiting is not None and waiting.grant == step.grant.grant
        known = waiting if in_flight else self._known(id, replica, step.grant.grant)
        if known is not None:
            self._site.rundir.save_grant(id, as_held(known, step.grant))
        self._accounting.change(step.grant)
        if known is None:
            return  # nobody has it yet, or it is just being given up
        record = as_held(known, step.grant)
        self._count(step, record)
        if in_flight:
            self._changed(id, record)
            if step.recalled:
                self._gave(record.grant, record.version)
        elif replica is not None and replica.held is not None and replica.held.grant is not None:
            replica.held.grant = record
            self._publish(record)
            if step.told:
                self._tell(replica, record)

    def begun(self, record: GrantRecord | None, claimed: GrantRecord | None) -> None:
        """Its cell begins. claimed: the record that stands in etcd."""
        if record is not None and record is not claimed:
            self._publish(record)

    def connected(self, replica: LocalReplica) -> None:
        """The replica said hello: what it was told may be lost, or be another daemon's."""
        held = replica.held
        if held is None or held.grant is None or not held.grant.wants:
            return
        now = self._site.queue.grants.get(held.grant.grant)
        if now is not None:
            record = as_held(held.grant, now)
            try:
                self._site.rundir.save_grant(replica.id, record)
            except OSError as err:
                log.error("%s is not told what is lent to it, which cannot be noted: %s", replica.name, err)
                asyncio.get_running_loop().call_later(AGAIN, self.connected, replica)
                return
            held.grant = record
            self._tell(replica, record)

    def late(self, grant: str) -> None:
        """It did not give back in time: the next stage, and so on until it has."""
        self._climb(grant, 1)

    def ended(self, grant: str) -> None:
        self._given_back(grant)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _known(self, id: ReplicaId, replica: LocalReplica | None, grant: str) -> GrantRecord | None:
        """The grant with all that its record says, whether its replica is connected or was only found again."""
        held = replica.held.grant if replica is not None and replica.held is not None else None
        found = held if held is not None else self._site.rundir.load_grant(id)
        return found if found is not None and found.grant == grant else None

    def _tell(self, replica: LocalReplica, record: GrantRecord) -> None:
        stays = self._site.queue.loans.stays(record.grant)
        assert replica.held is not None
        share = record.shares[0]
        on = sorted(share.tpcs if stays is None else stays)
        lent = len(set(on) & set(share.lent))
        message = {"type": "slice", "n": replica.held.n, "grant": record.grant, "version": record.version}
        replica.push({**message, "tpcs": on, "lent": lent, "within": self._terms.within})

    def _count(self, step: Reslice, record: GrantRecord) -> None:
        name, now = record.grant, self._site.now()
        if step.recalled and name not in self._recalled:
            self._recalled[name] = now
            self._site.meters.recalled(len(step.recalled))
        elif not step.recalled and name in self._recalled:
            self._site.meters.returned(now - self._recalled[name])
            self._given_back(name)

    def _given_back(self, name: str) -> None:
        self._recalled.pop(name, None)
        timer = self._late.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _climb(self, grant: str, stage: int) -> None:
        replica = next(
            (r for r in self._site.replicas.values() if r.held and r.held.grant and r.held.grant.grant == grant), None
        )
        if grant not in self._recalled or stage > STAGES.index(self._terms.late):
            return
        if replica is not None:
            carry_out(replica, Act(replica.id, STAGES[stage], self._text(stage)))
        loop = asyncio.get_running_loop()
        self._late[grant] = loop.call_later(self._terms.patience, self._climb, grant, stage + 1)

    def _text(self, stage: int) -> str:
        patience = f"{self._terms.patience:.0f} s"
        will = {1: "interrupted", 2: "restarted from its last committed cell"}
        last = stage >= STAGES.index(self._terms.late)
        threat = "" if last or stage not in will else f" If it goes on, it is {will[stage]} in {patience}."
        done = {1: "", 2: " The cell is interrupted.", 3: " Its process is restarted, from the state before this cell."}
        return (
            f"NBOS: this cell was asked to give back the TPCs that were lent to it, and did not within {patience}."
            f"{done[stage]}{threat} Cells give back at the end of an optimizer's step or between two lines of Python, "
            "not in the middle of a long call; borrow=no in the first line keeps a cell from borrowing."
        )

    # -- etcd, for people ---------------------------------------------------------------------------------------------

    def _publish(self, record: GrantRecord) -> None:
        running = record.grant in self._publishing
        self._publishing[record.grant] = record
        if not running:
            self._site.spawn(self._write(record.grant), f"writing grant {record.grant}")

    async def _write(self, grant: str) -> None:
        """The newest record, while there is one: never over a grant that was given back."""
        try:
            while True:
                record = self._publishing[grant]
                await self._site.commit_for_sure(lambda record=record: self._put(record))  # type: ignore[misc]
                if self._publishing[grant] is record:
                    return
        finally:
            del self._publishing[grant]

    def _put(self, record: GrantRecord) -> Txn:
        key, lease = grant_key(record), self._site.lease_id
        return Txn([lease_is(key, lease)], [op_put(key, records.encode(record), lease)])


def as_held(known: GrantRecord, now: GrantRecord) -> GrantRecord:
    """`known`, which says what holds it and why it is so large, with the TPCs of `now`."""
    pairs = zip(known.shares, now.shares, strict=True)
    shares = tuple(replace(share, tpcs=new.tpcs, lent=new.lent) for share, new in pairs)
    return replace(known, shares=shares, wants=now.wants, version=now.version)
