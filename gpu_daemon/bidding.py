"""Bids: may this replica run execution n? Room on the devices first, then one etcd transaction, which is the election.

Guarantees: a reservation whose claim is lost is given back; a bid that waits is told why and at which place, at
once, at each change and every two seconds, and ends on `cancel`, when somebody else takes or decides n, and with its
process. A repeated bid (the socket was lost, the answer with it) joins the first or gets its answer again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace as replace_bid
from typing import Any

from msgspec.structs import replace

from gpu_daemon import ledger, queue
from gpu_daemon.accounting import Accounting
from gpu_daemon.ahead import ClaimsAhead
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.giving import Giving
from gpu_daemon.lender import Lender, Terms
from gpu_daemon.limits import over_limit
from gpu_daemon.loans import Late, Reslice
from gpu_daemon.openbid import OpenBid, Run, Yielded, lead, waiting
from gpu_daemon.publishing import Publisher
from gpu_daemon.replica import Held, LocalReplica
from gpu_daemon.requests import BidRequest, GaveBack
from gpu_daemon.site import Refused, Site, log
from gpu_daemon.transactions import withdraw
from gpu_daemon.waitingroom import WaitingRoom
from nbos_cluster import election, moving
from nbos_cluster.etcd import EtcdError, EtcdUnavailable, LeaseGone
from nbos_cluster.kernelview import KernelView
from nbos_cluster.records import ClaimRecord, GrantRecord, KernelSpec, Resources
from nbos_cluster.wire import Message

ETCD_PAUSE = 0.3
AGAIN = 1.0
EPOCH_TRIES = 5
LOOK_AGAIN = 1.0
"""Seconds until it is looked again whether what the ledger says is free is free on the device."""
HERE = Resources(tpcs=1, memory=1)
"""The least that a process can be granted on a device, besides what it brings there."""


class Bidding:
    def __init__(self, site: Site, publisher: Publisher, accounting: Accounting, terms: Terms | None = None) -> None:
        self._site, self._accounting = site, accounting
        self.ahead = ClaimsAhead(site)
        self.giving = Giving(site)
        self.giving.room_changed = self.room_changed
        self.giving.bids = lambda id: id in self._open
        terms = terms or Terms()
        self._open: dict[ReplicaId, OpenBid] = {}
        self._queued: dict[str, OpenBid] = {}
        self._names, self._numbers = uuid.uuid4().hex[:12], itertools.count()
        """Names of grants: random for this daemon's life, then counted, since every random number is a system call."""
        self._steps: deque[queue.Instruction] = deque()
        self._carrying = False
        self._tick: asyncio.TimerHandle | None = None
        self.lender = Lender(site, accounting, terms, self._pending, self._pending_changed, self.gave)
        self.room = WaitingRoom(site, publisher, self._queued, self.room_changed)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def bid(self, replica: LocalReplica, request: BidRequest) -> Message:
        """The answer. Returns when it is decided, which for a waiting bid may take as long as others compute."""
        held = replica.held
        if held is not None and held.n == request.n:
            return lead(held, self._later(request))
        return await self.join(replica, self._settled(request), self._counted)

    async def join(self, replica: LocalReplica, request: BidRequest, run: Run) -> Message:
        """What `run` comes to for the bid, which is begun, or found where it is under way."""
        bid = self._open.get(replica.id)
        if bid is not None and bid.request.n != request.n:
            bid.end("cancelled", f"the replica bids for execution {request.n} now")
            bid = None
        if bid is None or bid.over:
            bid = OpenBid(replica, request, f"{self._names}{next(self._numbers):08x}")
            self._open[replica.id] = bid
            bid.task = self._site.spawn(run(bid), f"{request.kind} of {replica.name} for {request.n}")
        assert bid.task is not None
        # The bid outlives a lost socket: the replica repeats it and finds its place in the queue kept.
        return await asyncio.shield(bid.task)

    def closed(self, bid: OpenBid) -> None:
        """It is decided."""
        bid.grant = None
        if self._open.get(bid.replica.id) is bid:
            del self._open[bid.replica.id]

    def cancel(self, replica: LocalReplica, n: int) -> None:
        bid = self._open.get(replica.id)
        if bid is not None and bid.request.n == n:
            bid.end("cancelled", f"execution {n} was cancelled while it waited")

    def replica_died(self, replica: LocalReplica) -> None:
        self.ahead.drop(replica)
        bid = self._open.pop(replica.id, None)
        if bid is not None:
            bid.end("cancelled", "the replica's process ended")

    def kernel_changed(self, view: KernelView) -> None:
        """Ends the waits that the records have decided, and claims that were made ahead of a change."""
        self.ahead.kernel_changed(view)
        for bid in [b for b in self._open.values() if b.replica.id.kernel == view.kernel]:
            n = bid.request.n
            held = view.claim_of(n)
            if view.last >= n:
                bid.end("stale", f"execution {n} is decided already", view.last + 1)
            elif held is not None and (held.record.replica, held.record.host) != (
                bid.replica.id.index,
                self._site.host,
            ):
                bid.end("taken", f"replica {held.record.replica} on {held.record.host} runs execution {n}")
            elif (
                view.spec is not None and bid.request.kind == "cell" and moving.leaves(view.spec, bid.replica.id.index)
            ):
                bid.end("draining", _moved_away(bid))

    def stop(self) -> None:
        for replica in self._site.replicas.values():
            self.ahead.drop(replica)
        for bid in self._open.values():
            if bid.request.kind != "touch":  # a running cell's: asked again of the next daemon, where the cell lives on
                bid.end("draining", f"host {self._site.host} takes no new cells")

    def waits(self) -> Iterator[tuple[str, Resources]]:
        """The owner of each cell that waits in this host's queue, and what it asks for."""
        for bid in self._queued.values():
            view = self._site.view(bid.replica.id.kernel)
            if view is not None and view.spec is not None:
                yield view.spec.owner, bid.request.resources

    # -- one bid ------------------------------------------------------------------------------------------------------

    async def _counted(self, bid: OpenBid) -> Message:
        began = self._site.now()
        answer = await self._run(bid)
        self._site.meters.bid(answer.get("code") or "lead", self._site.now() - began - bid.waited)
        return answer

    async def _run(self, bid: OpenBid) -> Message:
        grant: GrantRecord | None = None
        held: Held | None = None
        try:
            spec = self._check(bid)
            await self.giving.settled(bid.replica)
            if bid.replica.frozen is not None:
                await self._thaw(bid, spec)
            if bid.request.resources.wants_gpu:
                self.ahead.drop(bid.replica)  # while it waits for room here, another host may have some
                grant = await self.reserve(bid, spec)
            held = await self._claim(bid)
            if grant is not None:
                held.waited = bid.waited
                self._site.meters.granted(grant, bid.waited)
            return lead(held, self._later(bid.request))
        except Yielded as yielded:
            return yielded.answer
        except EtcdError as err:
            return Yielded("unavailable", f"etcd refused the claim: {err}").answer
        finally:
            self.closed(bid)
            if held is None:
                self.ahead.drop(bid.replica)
            if grant is not None and held is None:
                self._site.rundir.save_grant(bid.replica.id, None)
                self.grant_ended(grant.grant, used=False)

    def _settled(self, request: BidRequest) -> BidRequest:
        """A cell that may begin without a GPU is asked what it wants at once where it could never get one here later:
        another host may have what it needs."""
        site = self._site
        if request.touch is None or (site.settings.gpu_on_touch and site.ledger.possible(request.touch) is None):
            return request
        return replace_bid(request, resources=request.touch, touch=None)

    def _later(self, request: BidRequest) -> Message | None:
        """What a cell that leads without a grant may get when it first needs one."""
        if request.touch is None:
            return None
        real = any(device.kind == "nvml" for device in self._site.ledger.devices)
        return {"devices": request.touch.gpus or 1, "real": real}

    def _check(self, bid: OpenBid) -> KernelSpec:
        """What is known without asking anybody. Raises Yielded."""
        request, replica, site = bid.request, bid.replica, self._site
        if site.stopping:
            raise Yielded("draining", f"host {site.host} takes no new cells")
        view = site.view(replica.id.kernel)
        if view is None or view.spec is None or view.epoch is None:
            raise Yielded("unavailable", f"kernel {replica.id.kernel} is not (or no longer) known")
        if view.spec.placement.get(str(replica.id.index)) != site.host:
            raise Yielded("draining", f"replica {replica.id.index} is no member on host {site.host} any more")
        if request.kind == "cell":
            self._check_leaving(bid, view.spec)
        if request.n <= view.last:
            raise Yielded("stale", f"execution {request.n} is decided already", view.last + 1)
        if request.applied < request.n - 1:
            reason = f"replica {replica.id.index} has applied the log up to {request.applied}, not {request.n - 1}"
            raise Yielded("behind", reason, max(view.last, request.applied) + 1)
        over = over_limit(request.resources, view.spec.max_resources, site.ledger.kinds)
        if over:
            raise Yielded("impossible", over)
        return view.spec

    def _check_leaving(self, bid: OpenBid, spec: KernelSpec) -> None:
        """Raises Yielded. What changed between cells may still be replicated by a replica that leaves: only it has
        that."""
        if moving.leaves(spec, bid.replica.id.index):
            raise Yielded("draining", _moved_away(bid))
        if self._site.draining and not bid.request.wait:
            # The others first. When none of them can run it either, the question comes again, willing to wait.
            raise Yielded("busy", f"host {self._site.host} drains")

    async def reserve(self, bid: OpenBid, spec: KernelSpec, resources: Resources | None = None) -> GrantRecord:
        """Room on the devices, waiting for it where the bid says so. Raises Yielded. resources: instead of the bid's,
        exactly these."""
        id, request = bid.replica.id, bid.request
        if resources is not None:
            request = dataclasses.replace(request, resources=resources, code="", borrow=None)
        sized = self._site.sizing.wish(spec.owner, request, self._site.ledger.devices)
        wish = ledger.Request(
            bid.grant_name,
            spec.owner,
            id.kernel,
            id.index,
            request.n,
            sized.resources,
            groups=spec.groups,
            away=max(request.away, self.giving.tiers.away((id.kernel, id.index))),
            borrow=request.borrow,
        )
        granted: asyncio.Future[GrantRecord] = asyncio.get_running_loop().create_future()
        bid.granted = granted
        self._queued[bid.grant_name] = bid
        now = self._site.now()
        self._carry_out(self._site.queue.handle(queue.Arrive(wish, now, request.wait)))
        ends: set[asyncio.Future[Any]] = {granted, bid.ended}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if bid.over and not granted.done():
                bid.ended.result()
            site = self._site
            # What is lent to it may have changed since it was admitted.
            grant = site.queue.grants.get(bid.grant_name) or granted.result()
            shares = site.offers.held(grant.shares, site.ledger.devices)
            if site.power is not None:
                shares = site.power.clocked(shares)
            loan = site.offers.no_loans(grant.shares) if request.borrow and not grant.wants else ""
            bid.grant = sized.signed(replace(grant, since=time.time(), shares=shares, loan=loan))
            self._nothing_runs(bid.grant)
            return bid.grant
        finally:
            bid.granted, bid.waited = None, self._site.now() - now
            self._queued.pop(bid.grant_name, None)
            self.room.left(bid.grant_name)
            if not granted.done():
                self._carry_out(self._site.queue.handle(queue.Leave(bid.grant_name, self._site.now())))

    async def thaw(self, replica: LocalReplica) -> None:
        """A frozen process has something else to do than a cell. Returns when it may call CUDA. Raises Refused."""
        view = self._site.view(replica.id.kernel)
        await self.giving.settled(replica)
        if replica.frozen is None or view is None or view.spec is None:
            replica.push({"type": "thawed"})
            return
        request = BidRequest(0, 1, "sync", Resources(), True, -1)
        bid = OpenBid(replica, request, f"{self._names}{next(self._numbers):08x}")
        try:
            await self._thaw(bid, view.spec)
        except Yielded as yielded:
            raise Refused("unavailable", str(yielded)) from None

    async def _thaw(self, bid: OpenBid, spec: KernelSpec) -> None:
        """What the driver holds of the process goes back to a device, before anything runs in it. Raises Yielded."""
        replica, request = bid.replica, bid.request
        if request.resources.wants_gpu and not request.wait:
            who = ((replica.id.kernel, replica.id.index), replica.frozen.size if replica.frozen is not None else 0)
            fit = self._site.ledger.fit(request.resources, (), None, *who)
            if not isinstance(fit, ledger.Fit):
                raise Yielded("busy", fit.reason)
        while True:
            # Room for what comes back, as a grant that ends at once: the memory stays counted as the process's.
            room, trouble = await self.reserve(bid, spec, HERE), "the daemon ends"
            try:
                trouble, final = await self.giving.thaw(replica, room.shares[0].uuid)
            finally:
                bid.grant = None
                self.grant_ended(room.grant, used=not trouble)
            if not trouble:
                return
            if final or not request.wait:
                raise Yielded("unavailable" if final else "busy", trouble)
            replica.push(waiting(request.n, trouble))
            await asyncio.wait([bid.ended], timeout=LOOK_AGAIN)
            if bid.over:
                bid.ended.result()

    async def _claim(self, bid: OpenBid) -> Held:
        """The election. Raises Yielded."""
        replica, request, site, grant = bid.replica, bid.request, self._site, bid.grant
        if bid.over:
            bid.ended.result()
        follows = self.ahead.follows(replica)
        if (held := self.ahead.use(replica, request)) is not None:
            held.follows, replica.held = follows, held
            return held
        record = ClaimRecord(
            n=request.n,
            replica=replica.id.index,
            host=site.host,
            attempt=request.attempt,
            grant=grant.grant if grant is not None else "",
            started=time.time(),
        )
        if grant is not None:
            self.note_grant(replica, grant)
        handle = replica.handle
        token = await self._claim_txn(bid, record, grant)
        # What is lent to it may have changed meanwhile.
        held = Held(request.n, token, record, bid.grant, follows=follows)
        if bid.over or replica.handle is not handle:
            # Its process ended while etcd answered: nothing ran, so n is free again for another replica.
            site.spawn(self._withdraw(replica.id.kernel, held), f"withdrawing the claim of {replica.name}")
            bid.ended.result()
            raise Yielded("cancelled", "the replica's process ended")
        replica.held = held
        self.lender.begun(record=held.grant, claimed=grant)
        return held

    def note_grant(self, replica: LocalReplica, grant: GrantRecord) -> None:
        """Raises Yielded: after a restart nothing would say that these devices are in use."""
        try:
            self._site.rundir.save_grant(replica.id, grant)
        except OSError as err:
            log.error("%s gets no device, since its grant cannot be noted: %s", replica.name, err)
            text = f"host {self._site.host} cannot write to its disk ({err.strerror}); its administrator must make room"
            raise Yielded("unavailable", text) from err

    async def _claim_txn(self, bid: OpenBid, record: ClaimRecord, grant: GrantRecord | None) -> int:
        with self._site.telling(lambda why: bid.replica.push(waiting(bid.request.n, why))):
            return await self._until_claimed(bid, record, grant)

    async def _until_claimed(self, bid: OpenBid, record: ClaimRecord, grant: GrantRecord | None) -> int:
        kernel, n, site = bid.replica.id.kernel, bid.request.n, self._site
        tries = 0
        await self._withdrawn(bid)
        while True:
            view = site.view(kernel)
            if bid.over:
                bid.ended.result()
            if view is None or view.epoch is None:
                raise Yielded("unavailable", f"kernel {kernel} is not (or no longer) known")
            epoch, revision = view.epoch, view.epoch_rev
            try:
                result = await site.commit(
                    election.claim(kernel, n, epoch=epoch, claim=record, grant=grant, lease=site.lease_id)
                )
            except (EtcdUnavailable, LeaseGone) as err:
                await self._wait_for_etcd(bid, err)
                continue
            match election.classify(n, result, record):
                case election.Won(token):
                    return token
                case election.Lost("epoch", _, reason) if tries < EPOCH_TRIES:
                    tries += 1
                    if not await self._epoch_moves(kernel, revision):
                        raise Yielded("unavailable", reason)
                    self._check(bid)
                case election.Lost(code, next, reason):
                    raise Yielded("unavailable" if code == "epoch" else code, reason, next)

    async def _withdrawn(self, bid: OpenBid) -> None:
        """Wait until what this replica gives back is given back. Raises Yielded."""
        while (task := bid.replica.withdrawing) is not None and not task.done():
            await asyncio.wait({task, bid.ended}, timeout=ETCD_PAUSE, return_when=asyncio.FIRST_COMPLETED)
            if bid.over:
                bid.ended.result()
            if self._site.away_since is not None and not bid.request.wait:
                raise Yielded("unavailable", self._site.away_text())

    async def _epoch_moves(self, kernel: str, revision: int) -> bool:
        """Wait until the local copy has a newer epoch than that of `revision`."""

        def moved() -> bool:
            view = self._site.view(kernel)
            return view is None or view.epoch_rev != revision

        return await self._site.until(moved, 1.0)

    async def _wait_for_etcd(self, bid: OpenBid, err: EtcdUnavailable | LeaseGone) -> None:
        """Returns when it is time to try again. Raises Yielded when the bid does not want to wait."""
        reason = self._site.away_text() if isinstance(err, EtcdUnavailable) else self._site.trouble(time.time())
        if isinstance(err, EtcdUnavailable) and not bid.request.wait:
            raise Yielded("unavailable", reason) from err
        if bid.request.wait:
            bid.replica.push(waiting(bid.request.n, reason))
        await asyncio.wait({bid.ended}, timeout=ETCD_PAUSE)

    async def _withdraw(self, kernel: str, held: Held) -> None:
        await self._site.commit_for_sure(lambda: withdraw(kernel, held.n, held.token, held.grant))

    # -- the queue ----------------------------------------------------------------------------------------------------

    def grant_ended(self, name: str, used: bool = True) -> None:
        """A grant is given back; whoever waits for the room gets it."""
        self._accounting.end(name, used)
        self.lender.ended(name)
        self._carry_out(self._site.queue.handle(queue.Ended(name, self._site.now(), used)))

    def gave_back(self, replica: LocalReplica, said: GaveBack) -> None:
        """A replica answers that it moved what it had on a device to host memory, or why it did not."""
        self.giving.gave(replica, said)
        bid = self._open.get(replica.id)
        if bid is not None and bid.grant_name in self._queued:
            brings = queue.Brings(bid.grant_name, said.away, self._site.now())
            self._carry_out(self._site.queue.handle(brings))
        self.room_changed()

    def room_changed(self) -> None:
        self._site.queue.wall = time.time() - self._site.now()
        self._carry_out(self._site.queue.handle(queue.Room(self._site.now())))

    def gave(self, grant: str, version: int) -> None:
        """A borrower is on its slice of that version, and nowhere else."""
        self._carry_out(self._site.queue.handle(queue.Gave(grant, version, self._site.now())))

    def lend_on(self, uuids: Iterable[str]) -> None:
        """The devices whose slices can change while a cell runs."""
        self._carry_out(self._site.queue.lend_on(uuids, self._site.now()))

    def _pending(self, id: ReplicaId) -> GrantRecord | None:
        bid = self._open.get(id)
        return bid.grant if bid is not None else None

    def _pending_changed(self, id: ReplicaId, grant: GrantRecord) -> None:
        self._open[id].grant = grant

    def _nothing_runs(self, grant: GrantRecord) -> None:
        """What is recalled of a grant whose cell has not begun is given back at once."""
        stays = self._site.queue.loans.stays(grant.grant)
        if stays is not None and len(stays) < len(grant.shares[0].tpcs):
            self.gave(grant.grant, grant.version)

    def _carry_out(self, instructions: list[queue.Instruction]) -> None:
        """In the order of the decisions, also of those that are made meanwhile."""
        self._steps.extend(instructions)
        if self._carrying:
            return
        self._carrying = True
        try:
            while self._steps:
                step = self._steps.popleft()
                self._step(step)
        except OSError as err:
            # What follows may give others what this record still names.
            self._steps.appendleft(step)
            log.error("what is lent cannot be noted, and stays as it is: %s; it is tried again", err)
            asyncio.get_running_loop().call_later(AGAIN, self._carry_out, [])
        finally:
            self._carrying = False
        self._look_later()

    def _step(self, step: queue.Instruction) -> None:
        match step:
            case Reslice():
                self.lender.reslice(step)
            case Late():
                self.lender.late(step.grant)
            case queue.Admit(grant):
                self._accounting.begin(grant)
                granted = self._asked(grant.grant)
                if granted is None:
                    self.grant_ended(grant.grant, used=False)
                else:
                    granted.set_result(grant)
            case queue.Refuse(name, code, reason):
                granted = self._asked(name)
                if granted is not None:
                    granted.set_exception(Yielded(code, reason))

    def _asked(self, name: str) -> asyncio.Future[GrantRecord] | None:
        """Who waits for the grant of that name, if anybody still does."""
        bid = self._queued.get(name)
        return bid.granted if bid is not None and bid.granted is not None and not bid.granted.done() else None

    def _look_later(self) -> None:
        """Tell those who wait, ask for what they lack, and look again when a borrower is late."""
        self.giving.look()
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        due = self._site.queue.loans.next_at()
        if due < float("inf"):
            delay = max(0.01, due - self._site.now())
            self._tick = asyncio.get_running_loop().call_later(delay, self.room_changed)
        self.room.changed()


def _moved_away(bid: OpenBid) -> str:
    return f"replica {bid.replica.id.index} is being moved away"
