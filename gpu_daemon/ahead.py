"""Claims made ahead: of cells that follow each other at once, an entry also claims the next number for its replica.

The election of such a cell then costs no transaction of its own. Guarantees:
- a bid is answered by such a claim only while this host's lease cannot have ended, by its clock, and in the epoch that
  the claim was made in;
- a number that is not asked for within UNUSED, that its replica yields or wants a GPU for, or whose replica dies or is
  to leave, is given back at once, for whoever asks next; until etcd has confirmed that, its replica makes no other
  claim, and it is not taken for its holder again, whatever an older copy of the records says;
- a replica that was lost with one holds others up no longer than one that was lost with a cell: as the lease lasts.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_daemon.replica import Held, LocalReplica
from gpu_daemon.transactions import withdraw
from nbos_cluster import election, moving
from nbos_cluster.records import ClaimRecord

if TYPE_CHECKING:
    from gpu_daemon.requests import BidRequest
    from gpu_daemon.site import Site
    from nbos_cluster.kernelview import KernelView

PACE = 1.0
"""Seconds between an entry and the next bid, at most, for the cells to count as following each other at once."""
UNUSED = 1.0


@dataclass(frozen=True)
class ClaimAhead:
    """What a replica holds and nothing runs under. lease: under which it was made. epoch: the record's revision."""

    claim: ClaimRecord
    token: int
    lease: int
    epoch: int
    timer: asyncio.TimerHandle

    def answers(self, n: int, attempt: int, lease: int, epoch: int) -> bool:
        """Whether it is the claim of this bid, under the lease that surely lives now (0: none), in the epoch of now."""
        return (n, attempt, lease, epoch) == (self.claim.n, 1, self.lease, self.epoch)


@dataclass(frozen=True)
class Claimed:
    """What an append was to claim besides. sure: it did, by this very try; else it may have, or may not."""

    ahead: election.Ahead
    token: int
    sure: bool


class ClaimsAhead:
    def __init__(self, site: Site) -> None:
        self._site = site

    def follows(self, replica: LocalReplica) -> bool:
        """Whether a bid that comes now follows the replica's latest entry at once."""
        return self._site.now() < replica.appended_at + PACE

    def wanted(self, replica: LocalReplica, held: Held) -> election.Ahead | None:
        """What the entry of `held` is to claim besides; None: nothing."""
        site, view = self._site, self._site.view(replica.id.kernel)
        if not held.follows or held.claim.grant or site.stopping or site.draining:
            return None
        lease = site.lease.sure_id if site.lease is not None else 0
        if not lease or view is None or view.spec is None or view.epoch is None:
            return None
        if moving.leaves(view.spec, replica.id.index):
            return None
        record = ClaimRecord(n=held.n + 1, replica=replica.id.index, host=site.host, started=time.time(), ahead=True)
        return election.Ahead(record, view.epoch, lease)

    def appended(self, replica: LocalReplica, held: Held, claimed: Claimed) -> None:
        """The entry of `held` stands."""
        if not claimed.sure or replica.held is not held or replica.handle is None:
            self.withdraw(replica, claimed.ahead.claim.n, claimed.token)
            return
        ahead = claimed.ahead
        timer = asyncio.get_running_loop().call_later(UNUSED, self.drop, replica)
        view = self._site.view(replica.id.kernel)
        epoch = view.epoch_rev if view is not None and view.epoch == ahead.epoch else -1
        replica.ahead = ClaimAhead(ahead.claim, claimed.token, ahead.lease, epoch, timer)

    def use(self, replica: LocalReplica, request: BidRequest) -> Held | None:
        """The claim for this bid, which its cell runs under from now on."""
        ahead, site, view = replica.ahead, self._site, self._site.view(replica.id.kernel)
        if ahead is None:
            return None
        lease = site.lease.sure_id if site.lease is not None else 0
        if not ahead.answers(request.n, request.attempt, lease, view.epoch_rev if view is not None else 0):
            self.drop(replica)
            return None
        ahead.timer.cancel()
        replica.ahead = None
        return Held(request.n, ahead.token, ahead.claim)

    def drop(self, replica: LocalReplica) -> None:
        """Nothing will run under it."""
        ahead, replica.ahead = replica.ahead, None
        if ahead is not None:
            ahead.timer.cancel()
            self.withdraw(replica, ahead.claim.n, ahead.token)

    def withdraw(self, replica: LocalReplica, n: int, token: int) -> None:
        """Done when `replica.withdrawing` is. Nothing happens where no such claim stands."""
        replica.withdrawn = token
        work = self._site.commit_for_sure(lambda: withdraw(replica.id.kernel, n, token, None))
        replica.withdrawing = self._site.spawn(work, f"giving back execution {n} of {replica.name}")

    def kernel_changed(self, view: KernelView) -> None:
        for replica in self._site.replicas.values():
            ahead = replica.ahead
            if ahead is not None and replica.id.kernel == view.kernel and view.epoch_rev != ahead.epoch:
                self.drop(replica)
