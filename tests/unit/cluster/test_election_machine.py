"""Promises 1 and 2 under every order of events hypothesis can think of.

Several daemons with copies of the records that lag behind bid, append, repeat what they do not know to have
succeeded, die, lose their leases and come back, while gateways restart, replan and fold with stale copies. What holds
is read from the history of the store, not from what the daemons believe.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fakestore import FakeEtcd
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_daemon.transactions import grant_within, withdraw
from nbos_cluster import election, keys, membership, records, statelog
from nbos_cluster.election import AlreadyThere, Appended, Fenced, Lost, Won
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import Changes
from nbos_cluster.records import (
    Checkpoint,
    ClaimRecord,
    Component,
    Epoch,
    Frame,
    GrantRecord,
    KernelSpec,
    LogEntry,
)

K = "kernel"
HOSTS = 3
daemons = st.integers(0, HOSTS - 1)
runs = st.sampled_from([-1, -1, -1, 0, 1])


@dataclass
class Running:
    """What a daemon believes to hold. It may be wrong."""

    n: int
    token: int
    record: ClaimRecord
    incarnation: int
    grant: str


@dataclass
class Daemon:
    index: int
    lease: int
    view: KernelView = field(default_factory=lambda: KernelView(K))
    running: list[Running] = field(default_factory=list)


class ElectionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = FakeEtcd()
        self.bids = 0
        self.daemons = [Daemon(i, self.store.grant()) for i in range(HOSTS)]
        self.gateway = KernelView(K)

    @initialize()
    def create(self) -> None:
        spec = KernelSpec(
            kernel=K,
            owner="ada",
            replicas=HOSTS,
            placement={str(i): f"host-{i}" for i in range(HOSTS)},
            key="k",
            curve_publickey="p",
            curve_secretkey="s",
        )
        txn = membership.create(spec)
        assert isinstance(membership.classify_create(spec, self.store.commit(txn)), membership.Created)
        assert isinstance(membership.classify_create(spec, self.store.commit(txn)), membership.Created)
        for view in [self.gateway, *(d.view for d in self.daemons)]:
            view.apply(self.store.snapshot(keys.kernel(K)))

    # -- what daemons do --------------------------------------------------------------------------------

    @rule(i=daemons, steps=st.integers(1, 3))
    def observe(self, i: int, steps: int) -> None:
        catch_up(self.daemons[i].view, self.store, steps)

    @rule(i=daemons)
    def observe_all(self, i: int) -> None:
        catch_up(self.daemons[i].view, self.store, 10**6)

    @rule(i=daemons)
    def read_anew(self, i: int) -> None:
        self.daemons[i].view.apply(self.store.snapshot(keys.kernel(K)))

    @rule(i=daemons, ahead=st.sampled_from([0, 0, 0, 1, -1]), gpu=st.booleans(), repeat=st.booleans())
    def bid(self, i: int, ahead: int, gpu: bool, repeat: bool) -> None:
        daemon = self.daemons[i]
        n, epoch = daemon.view.last + 1 + ahead, daemon.view.epoch
        if n < 1 or epoch is None or daemon.lease not in self.store.leases:
            return
        self.bids += 1
        grant = GrantRecord(grant=f"g{self.bids}", host=f"host-{i}", owner="ada", kernel=K, replica=i, n=n, shares=())
        mine = ClaimRecord(n=n, replica=i, host=f"host-{i}", attempt=self.bids)
        txn = election.claim(K, n, epoch=epoch, claim=mine, grant=grant if gpu else None, lease=daemon.lease)
        outcome = election.classify(n, self.store.commit(txn), mine)
        if repeat:  # the answer was lost on the way
            again = election.classify(n, self.store.commit(txn), mine)
            assert isinstance(outcome, Lost) or again == outcome
        if isinstance(outcome, Won):
            assert self.store.data[keys.claim(K, n)].mod_revision == outcome.token
            assert self.store.data[keys.epoch(K)].value == records.encode(epoch)
            key = keys.grant(f"host-{i}", grant.grant) if gpu else ""
            daemon.running.append(Running(n, outcome.token, mine, epoch.incarnation, key))
        else:
            self.check_loss(n, outcome)

    def check_loss(self, n: int, lost: Lost) -> None:
        last = self.last()
        assert {
            "taken": keys.claim(K, n) in self.store.data,
            "stale": n <= last and lost.next == last + 1,
            "behind": n > last + 1 and lost.next == last + 1,
            "epoch": True,
        }[lost.code]

    @rule(i=daemons, value=st.integers(0, 3))
    def cell(self, i: int, value: int) -> None:
        """All goes well, if nobody holds the execution."""
        self.lease_granted_again(i)
        self.observe_all(i)
        held = len(self.daemons[i].running)
        self.bid(i, 0, value == 0, False)
        if len(self.daemons[i].running) > held:
            self.append(i, -1, False, value, value % 2 == 1)

    def somebody_runs(self) -> bool:
        return any(daemon.running for daemon in self.daemons)

    def pick(self, i: int, which: int) -> tuple[Daemon, Running]:
        busy = [daemon for daemon in (self.daemons[i], *self.daemons) if daemon.running]
        return busy[0], busy[0].running[which % len(busy[0].running)]

    @precondition(somebody_runs)
    @rule(i=daemons, which=runs, repeat=st.booleans(), value=st.integers(0, 3), ahead=st.booleans())
    def append(self, i: int, which: int, repeat: bool, value: int, ahead: bool) -> None:
        daemon, run = self.pick(i, which)
        entry = LogEntry(
            n=run.n,
            kind="cell",
            token=run.token,
            replica=daemon.index,
            incarnation=run.incarnation,
            execution_count=run.n,
            source=f"x{value} = {run.n}",
            components=(component(f"x{value}", run.n),),
        )
        next = self.ahead(daemon, run) if ahead else None
        txn = election.append(K, entry, run.token, grant_key=run.grant, ahead=next)
        outcome = election.classify_append(run.n, run.token, self.store.commit(txn))
        if isinstance(outcome, election.EpochMoved):
            assert next is not None
            assert self.store.data[keys.epoch(K)].value != records.encode(next.epoch)
            assert keys.log_entry(K, run.n) not in self.store.data
            txn = election.append(K, entry, run.token, grant_key=run.grant)
            next, outcome = None, election.classify_append(run.n, run.token, self.store.commit(txn))
            assert isinstance(outcome, Appended), "the claim stands"
        if isinstance(outcome, Appended) and next is not None:
            assert self.store.data[keys.claim(K, run.n + 1)].mod_revision == outcome.revision
            daemon.running.append(Running(run.n + 1, outcome.revision, next.claim, next.epoch.incarnation, ""))
        if repeat:
            again = election.classify_append(run.n, run.token, self.store.commit(txn))
            assert isinstance(again, Fenced if isinstance(outcome, Fenced) else AlreadyThere)
        if isinstance(outcome, Appended | AlreadyThere):
            held = self.store.data[keys.log_entry(K, run.n)]
            assert records.decode(held.value, LogEntry).token == run.token
            assert run.grant not in self.store.data
        elif isinstance(outcome, Fenced) and outcome.decided:
            assert self.last() >= run.n

    def ahead(self, daemon: Daemon, run: Running) -> election.Ahead | None:
        """The next number, claimed with the entry; the daemon's copy of the epoch may be an old one."""
        epoch = daemon.view.epoch
        if epoch is None or daemon.lease not in self.store.leases:
            return None
        record = ClaimRecord(n=run.n + 1, replica=daemon.index, host=f"host-{daemon.index}", ahead=True)
        return election.Ahead(record, epoch, daemon.lease)

    @precondition(somebody_runs)
    @rule(i=daemons, which=runs, repeat=st.booleans())
    def withdraw(self, i: int, which: int, repeat: bool) -> None:
        """Nobody asks for the cell: its number is free again, if the claim is still that one."""
        _, run = self.pick(i, which)
        claim = self.store.data.get(keys.claim(K, run.n))
        self.store.commit(withdraw(K, run.n, run.token, None))
        if repeat:
            self.store.commit(withdraw(K, run.n, run.token, None))
        stands = claim is not None and claim.mod_revision != run.token
        assert (keys.claim(K, run.n) in self.store.data) == stands

    @precondition(somebody_runs)
    @rule(i=daemons, which=runs)
    def touch(self, i: int, which: int) -> None:
        """A running cell is granted a GPU on its way, perhaps under a claim that it does not hold any more."""
        daemon, run = self.pick(i, which)
        if daemon.lease not in self.store.leases:
            return
        self.bids += 1
        host = f"host-{daemon.index}"
        grant = GrantRecord(
            grant=f"g{self.bids}", host=host, owner="ada", kernel=K, replica=daemon.index, n=run.n, shares=()
        )
        claim, key = self.store.data.get(keys.claim(K, run.n)), keys.grant(host, grant.grant)
        stands = claim is not None and claim.mod_revision == run.token
        assert self.store.commit(grant_within(K, run.n, run.token, grant, daemon.lease)).succeeded == stands
        assert (key in self.store.data) == stands
        if stands:
            assert self.store.data[keys.claim(K, run.n)].mod_revision == run.token, "the token stays"
            assert self.store.data[key].lease == claim.lease, "it ends with its claim"
            run.grant = key

    @precondition(somebody_runs)
    @rule(i=daemons, which=runs)
    def renew(self, i: int, which: int) -> None:
        """A stale executor comes back and tries to go on."""
        daemon, run = self.pick(i, which)
        self.lease_granted_again(daemon.index)
        epoch = daemon.view.epoch
        if epoch is None or epoch.incarnation != run.incarnation:
            return
        txn = election.renew_claim(K, run.n, epoch=epoch, claim=run.record, lease=daemon.lease)
        outcome = election.classify(run.n, self.store.commit(txn), run.record)
        if isinstance(outcome, Won):
            assert keys.log_entry(K, run.n) not in self.store.data
            run.token = outcome.token

    @rule(i=daemons)
    def lease_ends(self, i: int) -> None:
        """The host is cut off: etcd ends the lease, the daemon still believes in what it holds."""
        self.store.expire(self.daemons[i].lease)

    @precondition(somebody_runs)
    @rule(i=daemons, other=daemons)
    def taken_over(self, i: int, other: int) -> None:
        """The executor is cut off in the midst of its cell, and another replica runs it again."""
        daemon, _ = self.pick(i, -1)
        self.store.expire(daemon.lease)
        self.lease_granted_again(other)
        self.observe_all(other)
        self.bid(other, 0, False, False)

    @rule(i=daemons)
    def lease_granted_again(self, i: int) -> None:
        if self.daemons[i].lease not in self.store.leases:
            self.daemons[i].lease = self.store.grant()

    @rule(i=daemons)
    def kill(self, i: int) -> None:
        """The daemon starts again, knowing nothing; its lease ends later, or not before it is resumed."""
        old = self.daemons[i]
        self.daemons[i] = Daemon(i, old.lease)
        self.daemons[i].view.apply(self.store.snapshot(keys.kernel(K)))

    @rule(i=daemons, held=st.booleans(), which=runs)
    def abandon(self, i: int, held: bool, which: int) -> None:
        n, token = self.daemons[i].view.last + 1, None
        if held and self.somebody_runs():
            _, run = self.pick(i, which)
            n, token = run.n, run.token
        if n < 1:
            return
        before = self.last()
        txn = election.abandon(K, n, "its process died", token)
        outcome = election.classify_abandon(n, self.store.commit(txn))
        if isinstance(outcome, Appended):
            assert (before, self.last()) == (n - 1, n)

    @rule(i=daemons)
    def fold(self, i: int) -> None:
        view = self.daemons[i].view
        upto = view.last - 1
        if upto not in view.log:
            return
        first = view.checkpoint.upto + 1 if view.checkpoint is not None else 0
        new = statelog.fold(view.checkpoint, view.entries(first, upto))
        self.store.commit(statelog.fold_txn(K, view.checkpoint_rev, new, upto, upto_rev=view.log_revs[upto]))

    # -- what gateways do -------------------------------------------------------------------------------

    @rule(steps=st.integers(1, 10**6))
    def gateway_observes(self, steps: int) -> None:
        catch_up(self.gateway, self.store, steps)

    @rule()
    def restart(self) -> None:
        if self.store.commit(membership.restart(self.gateway)).succeeded:
            assert not [key for key in self.store.data if key.startswith(keys.claims(K))]

    @rule(hosts=st.permutations([f"host-{i}" for i in range(HOSTS)]))
    def replan(self, hosts: list[str]) -> None:
        self.store.commit(membership.replan(self.gateway, {str(i): h for i, h in enumerate(hosts)}))

    # -- what must hold ---------------------------------------------------------------------------------

    def last(self) -> int:
        log = [key for key in self.store.data if key.startswith(keys.log(K))]
        return max((election.number_of(key) for key in log), default=-1)

    @invariant()
    def the_log_has_no_gap(self) -> None:
        kv = self.store.data.get(keys.checkpoint(K))
        start = records.decode(kv.value, Checkpoint).upto + 1 if kv is not None else 0
        log = sorted(election.number_of(key) for key in self.store.data if key.startswith(keys.log(K)))
        assert log == list(range(start, start + len(log)))

    @invariant()
    def only_the_next_execution_is_claimed(self) -> None:
        claims = [election.number_of(key) for key in self.store.data if key.startswith(keys.claims(K))]
        assert claims in ([], [self.last() + 1])

    @invariant()
    def only_holders_appended_and_nothing_was_decided_twice(self) -> None:
        check_history(self.store.history)

    @invariant()
    def the_folded_log_is_the_whole_log(self) -> None:
        every = logged(self.store.history)
        if every:
            fresh = KernelView(K)
            fresh.apply(self.store.snapshot(keys.kernel(K)))
            state, rest = fresh.catch_up(-1)
            assert statelog.fold(state, rest) == statelog.fold(None, every)

    @invariant()
    def a_view_that_caught_up_is_the_truth(self) -> None:
        fresh, followed = KernelView(K), KernelView(K)
        fresh.apply(self.store.snapshot(keys.kernel(K)))
        for changes in self.store.history:
            followed.apply(changes)
        for name in ("spec", "epoch", "epoch_rev", "checkpoint", "claims", "log", "log_revs", "last"):
            assert getattr(fresh, name) == getattr(followed, name), name


def component(name: str, value: int) -> Component:
    data = b"%d" % value
    return Component(names=(name,), digest=str(value), frames=(Frame(size=len(data), data=data),))


def catch_up(view: KernelView, store: FakeEtcd, steps: int) -> None:
    for changes in store.since(view.revision)[:steps]:
        view.apply(changes)


def logged(history: list[Changes]) -> list[LogEntry]:
    prefix = keys.log(K)
    return [
        records.decode(event.kv.value, LogEntry)
        for changes in history
        for event in changes.events
        if event.kind == "put" and event.kv.key.startswith(prefix)
    ]


def check_history(history: list[Changes]) -> None:
    """Replay what was written, and check every claim and every entry against what stood at that moment."""
    claims: dict[int, int] = {}
    last, incarnation, decided = -1, 1, set()
    for changes in history:
        ended = dict(claims)
        for event in changes.events:
            key, put = event.kv.key, event.kind == "put"
            if key == keys.epoch(K) and put:
                incarnation = records.decode(event.kv.value, Epoch).incarnation
            if key.startswith(keys.claims(K)) and not put:
                claims.pop(election.number_of(key), None)
        for event in changes.events:
            if event.kind == "put" and event.kv.key.startswith(keys.log(K)):
                entry = records.decode(event.kv.value, LogEntry)
                assert entry.n == last + 1
                assert entry.n not in decided
                assert entry.n not in claims, "a decided execution has no claim"
                if entry.kind == "cell":
                    assert ended.get(entry.n) == entry.token, "only the holder of the claim appends"
                    assert entry.incarnation == incarnation
                decided.add(entry.n)
                last = entry.n
        for event in changes.events:  # last: an entry may claim what comes after it
            if event.kind == "put" and event.kv.key.startswith(keys.claims(K)):
                n = election.number_of(event.kv.key)
                assert n not in claims, f"execution {n} was claimed twice"
                assert n == last + 1, f"execution {n} was claimed while {last} was the last decided"
                claims[n] = event.kv.mod_revision


TestElection = ElectionMachine.TestCase
TestElection.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
