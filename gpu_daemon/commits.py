"""What a replica's claim comes to: entry appended, claim renewed after a lost lease, or execution abandoned.

Guarantees: only the replica that holds claim n appends entry n; while etcd is away an append waits and is repeated,
never dropped; when a replica dies with a claim, n is abandoned with the reason and its grant is given back, whatever
etcd does meanwhile.
"""

from __future__ import annotations

import asyncio
import time

from msgspec.structs import replace

from gpu_daemon.ahead import Claimed
from gpu_daemon.bidding import Bidding
from gpu_daemon.folding import Folding, store_blob
from gpu_daemon.openbid import waiting
from gpu_daemon.replica import Held, LocalReplica
from gpu_daemon.requests import RequestError, Took
from gpu_daemon.site import RETRY_LAST, Refused, Site, log
from gpu_daemon.transactions import abandon_held, end_grant, grant_key, grant_within
from nbos_cluster import election, statelog
from nbos_cluster.etcd import EtcdError, EtcdUnavailable, LeaseGone
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import Txn
from nbos_cluster.records import ClaimRecord, GrantRecord, LogEntry
from nbos_cluster.statelog import Spill
from nbos_cluster.statewire import EntryError, entry_from_wire
from nbos_cluster.wire import ENTRY_LIMIT, Message


class Commits:
    def __init__(self, site: Site, bidding: Bidding) -> None:
        self._site = site
        self._bidding = bidding
        self.folding = Folding(site)

    # -- append -------------------------------------------------------------------------------------------------------

    async def append(self, replica: LocalReplica, raw: Message, token: int, payload: bytes) -> None:
        """Put the entry into the log; returns when it is there.

        Raises Refused (`fenced`, `too_large`, `unavailable`) or RequestError.
        """
        try:
            # A long one is read in a thread: it holds up nobody.
            long = "bulk" in raw
            entry = await asyncio.to_thread(entry_from_wire, raw, payload) if long else entry_from_wire(raw, payload)
        except EntryError as err:
            raise RequestError(str(err)) from err
        # It outlives a lost socket; the replica repeats the request and joins it.
        if replica.appending is None or replica.appending.done() or replica.appending.get_name() != _work(entry.n):
            replica.appending = self._site.spawn(self._append(replica, entry, token), _work(entry.n))
        await asyncio.shield(replica.appending)

    async def _append(self, replica: LocalReplica, entry: LogEntry, token: int) -> None:
        if self._appended(replica, entry.n, token):
            return
        held = replica.held
        if held is None or held.n != entry.n or not held.knows(token):
            raise Refused("fenced", f"replica {replica.id.index} does not hold the claim of execution {entry.n}")
        began = self._site.now()
        entry = replace(entry, replica=replica.id.index, incarnation=replica.incarnation, at=time.time())
        spill = await self._fitting(replica, entry)
        ahead = await self._append_txn(replica, held, spill)
        self._site.meters.appended(self._site.now() - began)
        self.end_grant(replica, held, recorded=False)
        if ahead is not None:
            self._bidding.ahead.appended(replica, held, ahead)
        if replica.held is held:
            replica.held = None
        replica.appended, replica.appended_at = (entry.n, held.token), self._site.now()
        replica.applied = max(replica.applied, entry.n)
        self.folding.consider(replica.id.kernel)

    def _appended(self, replica: LocalReplica, n: int, token: int) -> bool:
        """Whether this very append was carried out before, and only its answer was lost."""
        if replica.appended == (n, token):
            return True
        view = self._site.view(replica.id.kernel)
        there = view.log.get(n) if view is not None else None
        return there is not None and (there.token, there.replica) == (token, replica.id.index)

    async def _fitting(self, replica: LocalReplica, entry: LogEntry) -> Spill:
        """The entry within the limit: what is too much for it is stored as a table first."""
        view = self._site.view(replica.id.kernel)
        lost = _lost_until_now(view) if view is not None else set()
        spill = await asyncio.to_thread(statelog.spill, entry, lost) if _large(entry) else statelog.spill(entry, lost)
        if not spill.fits:
            size = statelog.size_of(spill.record)
            raise Refused("too_large", f"entry {entry.n} has {size} bytes without its values, limit {ENTRY_LIMIT}")
        owner = self._owner(replica)
        for digest, data in spill.blobs.items():
            await store_blob(self._site, owner, digest, data)
        return spill

    async def _append_txn(self, replica: LocalReplica, held: Held, spill: Spill) -> Claimed | None:
        """What was to be claimed with it; None: nothing."""
        with self._site.telling(lambda why: _tell_next(replica, spill.record.n, why)):
            return await self._until_appended(replica, held, spill)

    async def _until_appended(self, replica: LocalReplica, held: Held, spill: Spill) -> Claimed | None:
        kernel, owner, entry = replica.id.kernel, self._owner(replica), spill.record
        ahead = tried = self._bidding.ahead.wanted(replica, held)
        while True:
            # The token may change while etcd is away: the lease was lost, the claim renewed.
            token, key = held.token, grant_key(held.grant)
            try:
                txn = election.append(kernel, replace(entry, token=token), token, grant_key=key, ahead=ahead)
                result = await self._site.blobs.commit(self._site.commit, owner, spill.needs, txn)
                outcome = election.classify_append(entry.n, token, result)
            except LeaseGone:
                ahead = None
                continue
            except EtcdUnavailable:
                if replica.handle is None:
                    raise Refused("unavailable", self._site.away_text()) from None
                await asyncio.sleep(RETRY_LAST / 4)
                continue
            except EtcdError as err:
                raise Refused("unavailable", f"etcd refused the entry: {err}") from err
            if isinstance(outcome, election.EpochMoved):
                ahead = None
                continue
            if not isinstance(outcome, election.Fenced):
                sure = isinstance(outcome, election.Appended)
                return None if tried is None or (sure and ahead is None) else Claimed(tried, outcome.revision, sure)
            ahead = None  # it was for the lease of before
            if outcome.decided or not await self._renewed(replica, held, token):
                raise Refused("fenced", outcome.reason)

    async def _renewed(self, replica: LocalReplica, held: Held, token: int) -> bool:
        """Whether the claim that ended with its lease is ours again (or was replaced meanwhile by its renewal)."""
        if held.token != token:
            return True
        return await self.renew(replica, held)

    # -- the grant ----------------------------------------------------------------------------------------------------

    def release(self, replica: LocalReplica, n: int, took: Took | None = None) -> None:
        """The cell ended; its devices are free for others while its state is captured."""
        self._bidding.cancel(replica, n)  # what it asked for while it ran, and waits for still
        held = replica.held
        if held is not None and held.n == n and held.grant is not None:
            self._site.sizing.learn(held.grant, took)
            if self._site.power is not None:
                self._site.power.ran(held.grant, took)
            self.end_grant(replica, held)

    def end_grant(self, replica: LocalReplica, held: Held, recorded: bool = True) -> None:
        """recorded: the grant's record is still in etcd and must go."""
        grant, held.grant = held.grant, None
        if grant is None:
            return
        self._site.rundir.save_grant(replica.id, None)
        self._site.meters.given_back(grant, max(0.0, time.time() - grant.since))
        self._bidding.grant_ended(grant.grant)
        if recorded:
            self._delete_grant(grant)

    def _delete_grant(self, grant: GrantRecord) -> None:
        self._site.spawn(self._site.commit_for_sure(lambda: end_grant(grant)), f"deleting grant {grant.grant}")

    # -- renewing -----------------------------------------------------------------------------------------------------

    async def lease_is_new(self) -> None:
        """Everything under the old lease is gone: claim again what runs, or end it."""
        for replica in list(self._site.replicas.values()):
            if replica.held is not None:
                await self.renew_or_end(replica, replica.held)

    async def renew_or_end(self, replica: LocalReplica, held: Held) -> None:
        if await self.renew(replica, held) or replica.held is not held:
            return
        reason = f"execution {held.n} was taken over while host {self._site.host} was cut off"
        log.warning("%s is fenced: %s", replica.name, reason)
        # The process still has the device: its grant, saved in the run directory, ends with it.
        replica.held = None
        replica.end(f"fenced: {reason}")

    async def renew(self, replica: LocalReplica, held: Held) -> bool:
        """Claim n again under the present lease. The new token is pushed to the replica."""
        kernel, site = replica.id.kernel, self._site
        view = site.view(kernel)
        if view is None or view.epoch is None or view.spec is None or view.spec.incarnation != replica.incarnation:
            return False
        if view.spec.placement.get(str(replica.id.index)) != site.host:
            return False
        epoch, named = view.epoch, list[GrantRecord | None]()

        def again() -> Txn:
            named.append(held.grant)
            return election.renew_claim(
                kernel, held.n, epoch=epoch, claim=held.claim, grant=held.grant, lease=site.lease_id
            )

        result = await site.commit_for_sure(again)
        outcome = election.classify(held.n, result, held.claim)
        if not isinstance(outcome, election.Won):
            return False
        if outcome.token != held.token:
            held.old_tokens.add(held.token)
            held.token = outcome.token
            replica.push({"type": "token", "n": held.n, "token": held.token})
        if (grant := held.grant) is not None and any(one != grant for one in named):
            # It was granted meanwhile (`touching`), under the lease of before.
            token = held.token
            site.spawn(
                site.commit_for_sure(lambda: grant_within(kernel, held.n, token, grant, site.lease_id)),
                f"recording grant {grant.grant} again",
            )
        return True

    # -- abandoning ---------------------------------------------------------------------------------------------------

    def replica_died(self, replica: LocalReplica, reason: str) -> None:
        """Its process is gone: what it held ends at once here, and in etcd as soon as that answers."""
        self._bidding.replica_died(replica)
        self._bidding.giving.died(replica)
        held, replica.held = replica.held, None
        if held is None:
            # What it was granted before a restart of the daemon, or before its claim was lost.
            self.drop_saved_grant(replica)
            self._bidding.room_changed()
            return
        grant = held.grant
        self.end_grant(replica, held, recorded=False)
        if not self._site.stopping:
            # On a host that shuts down the claim ends with the lease instead, and the cell runs again elsewhere.
            work = self.abandon(replica.id.kernel, held.n, held.token, reason, grant, replica.incarnation)
            self._site.spawn(work, f"abandoning execution {held.n} of {replica.name}")

    async def abandon(
        self, kernel: str, n: int, token: int, reason: str, grant: GrantRecord | None, incarnation: int
    ) -> None:
        at = time.time()
        result = await self._site.commit_for_sure(
            lambda: abandon_held(kernel, n, token, reason, grant=grant, incarnation=incarnation, at=at)
        )
        outcome = election.classify_abandon(n, result)
        self._site.meters.abandoned()
        log.info("execution %d of kernel %s abandoned (%s): %s", n, kernel, reason, outcome)
        if isinstance(outcome, election.Fenced) and grant is not None:
            self._delete_grant(grant)

    async def abandon_free(self, kernel: str, n: int, reason: str) -> None:
        """For `outcome`: decide that n, which nobody holds, changes nothing. Raises EtcdUnavailable."""
        view = self._site.view(kernel)
        incarnation = view.epoch.incarnation if view is not None and view.epoch is not None else 1
        txn = election.abandon(kernel, n, reason, incarnation=incarnation, at=time.time())
        await self._site.commit(txn)
        # Abandoned now, or somebody's claim or entry was in the way: either reaches the local copy shortly.
        await self._site.until(lambda: not free(self._site.view(kernel), n), 1.0)

    # -- after a restart of the daemon --------------------------------------------------------------------------------

    def found(self, replica: LocalReplica) -> None:
        """An earlier daemon's replica lives."""
        self._bidding.giving.found(replica)

    async def resume(self, replica: LocalReplica, n: int, token: int) -> None:
        """A replica that this daemon does not know to hold anything says that it runs n: check, and take it up."""
        if self._appended(replica, n, token):
            self.drop_saved_grant(replica)
            return
        if self.take_up(replica, n):
            assert replica.held is not None
            replica.held.old_tokens.add(token)
            if replica.held.token != token:
                replica.push({"type": "token", "n": n, "token": replica.held.token})
            return
        grant = self._saved_grant(replica)
        replica.held = Held(n, token, _claim_record(replica, n, self._site.host, grant), grant)
        await self.renew_or_end(replica, replica.held)

    def take_up(self, replica: LocalReplica, n: int) -> bool:
        """Whether the replica holds claim n in etcd; this daemon knows it from then on."""
        view = self._site.view(replica.id.kernel)
        claim = view.claim_of(n) if view is not None and replica.held is None else None
        if claim is not None and (replica.ahead is not None or claim.token == replica.withdrawn):
            return False
        if claim is None or (claim.record.replica, claim.record.host) != (replica.id.index, self._site.host):
            return False
        replica.held = Held(n, claim.token, claim.record, self._saved_grant(replica))
        return True

    def give_up(self, replica: LocalReplica, n: int, token: int, reason: str) -> None:
        """The replica lives, but will never run n, whose claim it has."""
        view = self._site.view(replica.id.kernel)
        claim = view.claim_of(n) if view is not None else None
        if claim is not None and claim.record.ahead and claim.token == token and replica.held is None:
            self._bidding.ahead.withdraw(replica, n, token)
            return
        held, replica.held = replica.held, None
        grant = held.grant if held is not None else self._saved_grant(replica)
        self.drop_saved_grant(replica)
        if held is not None:
            self.end_grant(replica, held, recorded=False)
        work = self.abandon(replica.id.kernel, n, token, reason, grant, replica.incarnation)
        self._site.spawn(work, f"abandoning execution {n} of {replica.name}")

    def drop_saved_grant(self, replica: LocalReplica) -> None:
        """A grant of before the restart that nothing runs under any more."""
        grant = self._saved_grant(replica)
        self._site.rundir.save_grant(replica.id, None)
        if grant is not None and (replica.held is None or replica.held.grant is None):
            self._bidding.grant_ended(grant.grant)
            self._delete_grant(grant)

    def _saved_grant(self, replica: LocalReplica) -> GrantRecord | None:
        grant = self._site.rundir.load_grant(replica.id)
        return grant if grant is not None and grant.grant in self._site.ledger.grants else None

    def _owner(self, replica: LocalReplica) -> str:
        view = self._site.view(replica.id.kernel)
        if view is None or view.spec is None:
            raise Refused("fenced", f"kernel {replica.id.kernel} is gone")
        return view.spec.owner


def _large(entry: LogEntry) -> bool:
    """Whether it takes long enough to encode that others would notice."""
    frames = [frame for component in entry.components for frame in component.frames]
    return (
        len(frames) + sum(len(f.blobs) for f in frames) > 1000 or sum(len(f.data or b"") for f in frames) > ENTRY_LIMIT
    )


def _lost_until_now(view: KernelView) -> set[str]:
    """Every name that the records call lost, or that was called so since the last fold."""
    before = view.checkpoint.lost if view.checkpoint is not None else {}
    return set(before).union(*(entry.lost for entry in view.log.values()))


def _work(n: int) -> str:
    return f"appending entry {n}"


def _tell_next(replica: LocalReplica, n: int, why: str) -> None:
    """The next execution cannot begin before entry n is in the log; whoever asks for it is told why."""
    replica.push(waiting(n + 1, f"the changes of the cell before are not stored yet: {why}"))


def _claim_record(replica: LocalReplica, n: int, host: str, grant: GrantRecord | None) -> ClaimRecord:
    name = grant.grant if grant is not None else ""
    return ClaimRecord(n=n, replica=replica.id.index, host=host, grant=name, started=time.time())


def free(view: KernelView | None, n: int) -> bool:
    return view is not None and view.last < n and view.claim_of(n) is None
