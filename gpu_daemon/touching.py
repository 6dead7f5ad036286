"""A grant for a cell that runs already: it began without one, and needs a GPU now (docs/gpus.md, "When it is touched").

Guarantees: the grant is put into etcd only while the cell's claim stands, in one transaction, under the claim's lease,
so none outlives its cell (promise 3), and it is no second claim (promise 1): the token stays. A request that is
repeated (the socket was lost, the daemon was restarted) joins the first, or is given the same grant. What was reserved
for a cell that left, ended or was fenced meanwhile is given back. It waits on this host only: the cell's state is
here.
"""

from __future__ import annotations

import asyncio

from gpu_daemon.bidding import ETCD_PAUSE, Bidding
from gpu_daemon.limits import over_limit
from gpu_daemon.openbid import OpenBid, Yielded, waiting
from gpu_daemon.replica import Held, LocalReplica
from gpu_daemon.requests import BidRequest
from gpu_daemon.site import Refused, Site, plain
from gpu_daemon.transactions import end_grant, grant_within
from nbos_cluster.etcd import EtcdError, EtcdUnavailable, LeaseGone
from nbos_cluster.records import GrantRecord, KernelSpec
from nbos_cluster.wire import Message


class Touching:
    def __init__(self, site: Site, bidding: Bidding) -> None:
        self._site, self._bidding = site, bidding

    async def touch(self, replica: LocalReplica, request: BidRequest, token: int) -> Message:
        """The grant, when there is room for it. Raises Refused with the code of a yield, or `fenced`."""
        held = replica.held
        if held is None or held.n != request.n or not held.knows(token):
            raise Refused("fenced", f"replica {replica.id.index} does not run execution {request.n} (any more)")
        try:
            if held.grant is not None:
                # Asked again. A daemon that was killed in between may have saved it, and not told etcd.
                await self._record(OpenBid(replica, request, held.grant.grant), held, held.grant)
                return _granted(held)
            answer = await self._bidding.join(replica, request, lambda bid: self._run(bid, held))
        except Yielded as yielded:
            raise Refused(yielded.answer["code"], yielded.answer["reason"]) from None
        if "refused" in answer:
            raise Refused(answer["refused"], answer["reason"])
        return answer

    async def _run(self, bid: OpenBid, held: Held) -> Message:
        """The answer, also where it is a refusal: whoever joins it gets the same."""
        site, grant = self._site, None
        try:
            grant = await self._bidding.reserve(bid, self._spec(bid))
            await self._record(bid, held, grant)
            held.waited = bid.waited
            site.meters.granted(grant, bid.waited)
            site.meters.touched()
            return _granted(held)
        except Yielded as yielded:
            return {"refused": yielded.answer["code"], "reason": yielded.answer["reason"]}
        except EtcdError as err:
            return {"refused": "unavailable", "reason": f"etcd refused the grant: {err}"}
        finally:
            self._bidding.closed(bid)
            if grant is not None and (held.grant is None or held.grant.grant != grant.grant):
                self._give_back(bid, grant)

    def _give_back(self, bid: OpenBid, grant: GrantRecord) -> None:
        site = self._site
        if bid.replica.held is None or bid.replica.held.grant is None:
            site.rundir.save_grant(bid.replica.id, None)
        self._bidding.grant_ended(grant.grant, used=False)
        if not site.stopping:  # else the next daemon finds it under our lease, and deletes it
            site.spawn(site.commit_for_sure(lambda: end_grant(grant)), f"deleting grant {grant.grant}")

    def _spec(self, bid: OpenBid) -> KernelSpec:
        """Raises Yielded."""
        view = self._site.view(bid.replica.id.kernel)
        if view is None or view.spec is None:
            raise Yielded("unavailable", f"kernel {bid.replica.id.kernel} is not (or no longer) known")
        over = over_limit(bid.request.resources, view.spec.max_resources, self._site.ledger.kinds)
        if over:
            raise Yielded("impossible", over)
        return view.spec

    async def _record(self, bid: OpenBid, held: Held, grant: GrantRecord) -> None:
        """Put the grant under the claim, however long etcd or a new lease takes. Raises Yielded."""
        site, replica, n = self._site, bid.replica, bid.request.n
        self._bidding.note_grant(replica, grant)
        while True:
            if bid.over:
                bid.ended.result()
            if replica.held is not held:
                raise Yielded("fenced", f"replica {replica.id.index} does not run execution {n} any more")
            token = held.token
            try:
                done = await site.commit(grant_within(replica.id.kernel, n, token, grant, site.lease_id))
            except (EtcdUnavailable, LeaseGone):
                replica.push(waiting(n, site.away_text()))
            else:
                # Its claim may have been renewed under another lease while etcd answered.
                if done.succeeded and held.token == token and replica.held is held and not bid.over:
                    # What is lent to it may have changed meanwhile.
                    held.grant = held.grant or bid.grant
                    self._bidding.lender.begun(record=held.grant, claimed=grant)
                    return
            await asyncio.wait({bid.ended}, timeout=ETCD_PAUSE)


def _granted(held: Held) -> Message:
    return {"grant": plain(held.grant), "waited": round(held.waited, 3)}
