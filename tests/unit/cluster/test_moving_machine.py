"""A replica moves while hosts, processes and gateways die at every step, with copies of the records that lag behind.

What holds is read from the store and from the processes, not from what the gateways believe:
- no cell ends by a move: whoever is removed holds no claim, and no daemon ends a process that holds one;
- whoever stays is ready, and has applied at least what was there when the move began;
- a number has one place, and a new one nothing of another replica under it;
- when everything is well again, the move ends, all members are ready, and a cell runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fakestore import FakeEtcd
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbos_cluster import election, keys, membership, moving, placement, records
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import Changes, Op, Txn, mod_is, op_put
from nbos_cluster.moving import Retire, Track, Turn, Wait, World
from nbos_cluster.records import ClaimRecord, HostRecord, KernelSpec, LogEntry, ReplicaRecord

K = "kernel"
NAMES = ["a", "b", "c", "d"]
hosts = st.sampled_from(NAMES)
steps = st.sampled_from([1, 2, 1000])
gateways = st.integers(0, 1)
picks = st.integers(0, 9)
reasons = st.sampled_from(["asked", "asked", "drain"])


@dataclass
class Process:
    incarnation: int
    applied: int = -1
    ready: bool = False
    claim: tuple[int, int] | None = None
    """n and token of the cell it runs."""


@dataclass
class Host:
    name: str
    lease: int
    alive: bool = True
    view: KernelView = field(default_factory=lambda: KernelView(K))
    processes: dict[int, Process] = field(default_factory=dict)


@dataclass
class Gateway:
    view: KernelView = field(default_factory=lambda: KernelView(K))
    track: Track = field(default_factory=Track)
    about: tuple[int, float] = (-1, 0.0)
    lost: set[str] = field(default_factory=set)


class MovingMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store, self.now = FakeEtcd(), 0.0
        self.hosts = {name: Host(name, self.store.grant()) for name in NAMES}
        self.gateways = [Gateway(), Gateway()]
        self.lost: set[str] = set()
        self.draining: set[str] = set()
        self.began_at = 0

    @initialize(replicas=st.integers(1, 3), first=picks, why=reasons)
    def create(self, replicas: int, first: int, why: str) -> None:
        self.replicas = replicas
        spec = KernelSpec(
            kernel=K,
            owner="ada",
            replicas=replicas,
            placement={str(i): NAMES[i] for i in range(replicas)},
            key="k",
            curve_publickey="p",
            curve_secretkey="s",
        )
        self.store.commit(membership.create(spec))
        for gateway in self.gateways:
            gateway.view.apply(self.store.snapshot(keys.kernel(K)))
        for host in self.hosts.values():
            self.observe(host, 1000)
            self.report_all(host)
        self.all_look()
        for n in (1, 2, 3):
            self.bid(NAMES[n % replicas], 0, sync=False)
            self.cells_end(NAMES[n % replicas])
            self.all_look()
        assert self.gateways[0].view.last == 3
        self.begin(0, NAMES[-1], first, why)

    # -- daemons and replicas -------------------------------------------------------------------------------------

    def observe(self, host: Host, count: int) -> None:
        catch_up(host.view, self.store, count)
        spec = host.view.spec
        assert spec is not None
        placed = {int(i) for i, name in spec.placement.items() if name == host.name}
        for index in set(host.processes) - placed:
            self.end(host, index)
            self.write(keys.replica(K, index), None, host)
        for index in placed:
            process = host.processes.get(index)
            if process is None or process.incarnation != spec.incarnation:
                host.processes[index] = Process(spec.incarnation)
                self.publish(host, index)

    def end(self, host: Host, index: int) -> None:
        """The daemon ends the process: it must not run a cell that counts."""
        process = host.processes.pop(index)
        if process.claim is not None:
            kv = self.store.data.get(keys.claim(K, process.claim[0]))
            assert kv is None or kv.mod_revision != process.claim[1], f"replica {index} was ended within its cell"

    def publish(self, host: Host, index: int) -> None:
        process = host.processes[index]
        state = "ready" if process.ready else "starting"
        record = ReplicaRecord(
            index=index, host=host.name, state=state, applied=process.applied, incarnation=process.incarnation
        )
        self.write(keys.replica(K, index), record, host)

    def write(self, key: str, record: ReplicaRecord | None, host: Host) -> None:
        """As `gpu_daemon/publishing.py`: only while the spec is as seen, and deleted only under the own lease."""
        there = self.store.data.get(key)
        if record is None:
            if there is not None and there.lease == host.lease:
                self.store._write([Op("delete", key)])
            return
        self.store.commit(
            Txn([mod_is(keys.spec(K), host.view.spec_rev)], [op_put(key, records.encode(record), host.lease)])
        )

    def report_all(self, host: Host, most: int = 1000) -> None:
        """Those that are ready apply up to `most` entries more, the others say hello."""
        for index, process in host.processes.items():
            if process.ready or most == 1000:
                process.applied = max(process.applied, min(process.applied + most, host.view.last))
            process.ready = True
            self.publish(host, index)

    @rule()
    def all_look(self, most: int = 1000, daemons: bool = True) -> None:
        for name in NAMES:
            if daemons:
                self.daemon_looks(name, 1000)
            self.replicas_report(name, most)
        for g in (0, 1):
            self.gateway_looks(g, 1000)

    @precondition(lambda self: self.spec().move is not None)
    @rule(source=st.booleans(), sync=st.booleans())
    def one_end_of_the_move_bids(self, source: bool, sync: bool) -> None:
        move = self.spec().move
        assert move is not None
        name, index = (move.from_host, move.source) if source else (move.to_host, move.target)
        if index in self.hosts[name].processes:
            self.bid(name, sorted(self.hosts[name].processes).index(index), sync)

    @rule(g=gateways, count=st.integers(1, 4), most=st.sampled_from([0, 1, 1000, 1000]), daemons=st.booleans())
    def time_goes_on(self, g: int, count: int, most: int, daemons: bool) -> None:
        for _ in range(count):
            self.now += 1.0
            self.all_look(most, daemons)
            if self.spec().move is not None:
                self.move_on(g)

    @rule(name=hosts, count=steps)
    def daemon_looks(self, name: str, count: int) -> None:
        if self.hosts[name].alive:
            self.observe(self.hosts[name], count)

    @rule(name=hosts, most=st.sampled_from([0, 1, 1000]))
    def replicas_report(self, name: str, most: int) -> None:
        if self.hosts[name].alive:
            self.report_all(self.hosts[name], most)

    @rule(name=hosts, pick=picks, sync=st.booleans())
    def bid(self, name: str, pick: int, sync: bool) -> None:
        host = self.hosts[name]
        spec, epoch = host.view.spec, host.view.epoch
        if not host.alive or not host.processes or spec is None or epoch is None:
            return
        index = sorted(host.processes)[pick % len(host.processes)]
        process, n = host.processes[index], host.view.last + 1
        placed = spec.placement.get(str(index)) == name and (sync or not moving.leaves(spec, index))
        if not placed or not process.ready or process.applied < n - 1 or process.claim is not None:
            return
        mine = ClaimRecord(n=n, replica=index, host=name, started=self.now)
        txn = election.claim(K, n, epoch=epoch, claim=mine, lease=host.lease)
        outcome = election.classify(n, self.store.commit(txn), mine)
        if isinstance(outcome, election.Won):
            process.claim = (n, outcome.token)

    @rule(name=hosts)
    def cells_end(self, name: str) -> None:
        for index, process in self.hosts[name].processes.items():
            if process.claim is not None:
                n, token = process.claim
                entry = LogEntry(n=n, kind="cell", token=token, replica=index)
                self.store.commit(election.append(K, entry, token))
                process.claim, process.applied = None, max(process.applied, n)

    @rule(name=hosts, pick=picks)
    def process_dies(self, name: str, pick: int) -> None:
        host = self.hosts[name]
        if not host.processes:
            return
        index = sorted(host.processes)[pick % len(host.processes)]
        process = host.processes[index]
        host.processes[index] = Process(process.incarnation)
        if process.claim is not None:
            self.store.commit(election.abandon(K, process.claim[0], "it died", process.claim[1]))
        self.publish(host, index)

    @precondition(lambda self: self.spec().move is not None)
    @rule(source=st.booleans(), what=st.sampled_from(["process", "host", "lost"]))
    def one_end_of_the_move_dies(self, source: bool, what: str) -> None:
        move = self.spec().move
        assert move is not None
        name = move.from_host if source else move.to_host
        if what == "process":
            self.process_dies(name, 0)
        else:
            self.host_dies(name)
        if what == "lost":
            self.host_is_given_up(name)
            self.gateway_looks(0, 1000)

    @rule(name=hosts)
    def host_dies(self, name: str) -> None:
        host = self.hosts[name]
        if host.alive and sum(h.alive for h in self.hosts.values()) > 1:
            host.alive, host.processes = False, {}
            self.store.expire(host.lease)

    @precondition(lambda self: any(not host.alive for host in self.hosts.values()))
    @rule(name=hosts)
    def host_comes_back(self, name: str) -> None:
        host = self.hosts[name]
        if not host.alive:
            host.alive, host.lease, host.view = True, self.store.grant(), KernelView(K)
            host.view.apply(self.store.snapshot(keys.kernel(K)))
            self.lost.discard(name)
            self.observe(host, 1000)

    @precondition(lambda self: any(not host.alive for host in self.hosts.values()))
    @rule(name=hosts)
    def host_is_given_up(self, name: str) -> None:
        if not self.hosts[name].alive:
            self.lost.add(name)

    # -- gateways -------------------------------------------------------------------------------------------------

    @rule(g=gateways, count=steps)
    def gateway_looks(self, g: int, count: int) -> None:
        catch_up(self.gateways[g].view, self.store, count)
        self.gateways[g].lost = set(self.lost)

    @rule(g=gateways)
    def gateway_is_started_again(self, g: int) -> None:
        self.gateways[g] = Gateway(lost=set(self.lost))
        self.gateways[g].view.apply(self.store.snapshot(keys.kernel(K)))

    @precondition(lambda self: self.spec().move is None)
    @rule(g=gateways, to=hosts, pick=picks, why=reasons)
    def begin(self, g: int, to: str, pick: int, why: str) -> None:
        view = self.gateways[g].view
        spec = view.spec
        assert spec is not None
        if spec.move is not None or to in spec.placement.values() or not self.hosts[to].alive:
            return
        source = sorted(spec.placement)[pick % len(spec.placement)]
        if why == "drain":
            self.draining = {spec.placement[source]}
        target, before = moving.free_index(view), dict(self.store.data)
        if self.store.commit(moving.begin(view, int(source), to, why, self.now)).succeeded:
            self.began_at = view.last
            assert keys.replica(K, target) not in before
            old = records.decode(before[keys.spec(K)].value, KernelSpec)
            assert str(target) not in old.placement

    @precondition(lambda self: self.spec().move is not None)
    @rule(g=gateways)
    def take_back(self, g: int) -> None:
        view = self.gateways[g].view
        move = view.spec.move if view.spec is not None else None
        if move is not None and moving.ready(view, move.source) is not None:
            self.store.commit(moving.turn(view, Turn("returning", "taken back")))

    @rule()
    def the_drain_is_taken_back(self) -> None:
        self.draining = set()

    @precondition(lambda self: self.spec().move is not None)
    @rule(g=gateways, seconds=st.sampled_from([0.0, 1.1]))
    def move_on(self, g: int, seconds: float = 0.0) -> None:
        self.now += seconds
        gateway = self.gateways[g]
        view, spec = gateway.view, gateway.view.spec
        if spec is None or spec.move is None:
            return
        about = (spec.move.target, spec.move.since)
        if gateway.about != about:
            gateway.about, gateway.track = about, Track()
        step = moving.decide(view, gateway.track, World(self.now, gateway.lost, self.draining))
        if isinstance(step, Turn):
            stays = view.replicas.get(spec.move.target)
            if step.phase == "leaving":
                assert stays is not None
                assert stays.applied >= min(self.began_at, view.last), "cells would wait for it"
            self.store.commit(moving.turn(view, step))
        elif isinstance(step, Retire):
            self.retire(view, step)
        else:
            assert isinstance(step, Wait)
            assert step.reason

    def retire(self, view: KernelView, step: Retire) -> None:
        spec, before = self.spec(), dict(self.store.data)
        if not self.store.commit(moving.retire(view, step)).succeeded:
            return
        assert spec.move is not None
        claims = [records.decode(kv.value, ClaimRecord) for key, kv in before.items() if key.startswith(keys.claims(K))]
        assert all(claim.replica != step.index for claim in claims), "removed within its cell"
        if step.unwatched:
            return
        stays = spec.move.target if step.index == spec.move.source else spec.move.source
        record = records.decode(before[keys.replica(K, stays)].value, ReplicaRecord)
        assert (record.state, record.incarnation, record.host) == (
            "ready",
            spec.incarnation,
            spec.placement[str(stays)],
        )
        assert record.applied >= min(self.began_at, view.last)

    @precondition(lambda self: self.spec().move is not None and self.spec().move.phase == "leaving")
    @rule()
    def the_one_that_stays_dies_and_cells_run(self) -> None:
        move, claims = self.spec().move, [key for key in self.store.data if key.startswith(keys.claims(K))]
        assert move is not None
        source, target = self.hosts[move.from_host], self.hosts[move.to_host]
        self.all_look()
        if claims or self.spec().move != move or not source.alive or not target.alive or self.lost:
            return
        self.process_dies(target.name, sorted(target.processes).index(move.target))
        self.gateway_looks(0, 1000)
        self.move_on(0)
        self.observe(source, 1000)
        self.bid(source.name, sorted(source.processes).index(move.source), sync=False)
        assert source.processes[move.source].claim is not None

    @precondition(lambda self: self.spec().move is not None)
    @rule(source=st.booleans(), what=st.sampled_from(["claims", "dies"]))
    def something_happens_unseen(self, source: bool, what: str) -> None:
        """Between a gateway's look and its transaction."""
        self.all_look()
        self.move_on(0)
        self.gateway_looks(0, 1000)
        if self.spec().move is not None:
            self.move_on(0)
        move = self.spec().move
        if move is None:
            return
        for name in NAMES:
            self.daemon_looks(name, 1000)
        name, index = (move.from_host, move.source) if source else (move.to_host, move.target)
        if what == "claims":
            self.one_end_of_the_move_bids(source, sync=True)
        elif index in self.hosts[name].processes:
            self.process_dies(name, sorted(self.hosts[name].processes).index(index))
        if self.spec().move is not None:
            self.move_on(0, 1.1)

    @precondition(lambda self: self.spec().move is not None)
    @rule(source=st.booleans())
    def a_host_that_was_given_up_comes_back_unseen(self, source: bool) -> None:
        move = self.spec().move
        assert move is not None
        name = move.from_host if source else move.to_host
        self.host_dies(name)
        self.host_is_given_up(name)
        self.gateway_looks(0, 1000)
        self.host_comes_back(name)
        self.report_all(self.hosts[name])
        self.one_end_of_the_move_bids(source, sync=False)
        self.move_on(0)

    @precondition(lambda self: self.lost)
    @rule(g=gateways)
    def repair(self, g: int) -> None:
        view = self.gateways[g].view
        if view.spec is None or self.gateways[g].lost != self.lost:
            return
        living = [HostRecord(name=name, address="", pid=1) for name in NAMES if name not in self.lost]
        plan = placement.replace_lost(view.spec, placement.loads(living, [view.spec]))
        if plan is not None:
            self.store.commit(membership.replan(view, plan))

    @rule(g=gateways)
    def user_restarts(self, g: int) -> None:
        if self.gateways[g].view.spec is not None:
            self.store.commit(membership.restart(self.gateways[g].view))

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # -- what must hold -------------------------------------------------------------------------------------------

    def spec(self) -> KernelSpec:
        return records.decode(self.store.data[keys.spec(K)].value, KernelSpec)

    @precondition(lambda self: keys.spec(K) in self.store.data)
    @invariant()
    def there_are_as_many_places_as_replicas_and_one_more_for_a_move(self) -> None:
        spec = self.spec()
        assert spec.replicas == self.replicas
        assert len(spec.placement) == self.replicas + (spec.move is not None)
        if spec.move is not None:
            assert spec.placement[str(spec.move.source)] == spec.move.from_host
            assert spec.placement[str(spec.move.target)] == spec.move.to_host

    @precondition(lambda self: keys.spec(K) in self.store.data)
    @invariant()
    def whoever_runs_a_cell_is_a_member(self) -> None:
        spec = self.spec()
        for key, kv in self.store.data.items():
            if key.startswith(keys.claims(K)):
                claim = records.decode(kv.value, ClaimRecord)
                assert spec.placement.get(str(claim.replica)) == claim.host

    def teardown(self) -> None:
        if keys.spec(K) not in self.store.data:
            return
        for name in set(NAMES) - self.lost:
            self.host_comes_back(name)
        for _ in range(12):
            for name in NAMES:
                self.cells_end(name)
            self.now += 3.0
            self.all_look()
            for g in (0, 1):
                self.gateway_looks(g, 1000)
                if self.spec().move is not None:
                    self.move_on(g)
                self.gateway_looks(g, 1000)
                self.repair(g)
        self.all_look()
        spec = self.spec()
        assert spec.move is None, spec.move
        for index, name in spec.placement.items():
            process = self.hosts[name].processes[int(index)]
            assert process.ready
            assert process.incarnation == spec.incarnation
        self.a_cell_runs()

    def a_cell_runs(self) -> None:
        before = len([key for key in self.store.data if key.startswith(keys.claims(K))])
        for name in NAMES:
            self.daemon_looks(name, 1000)
            self.replicas_report(name, 1000)
            self.bid(name, 0, sync=False)
        assert len([key for key in self.store.data if key.startswith(keys.claims(K))]) == before + 1 == 1


def catch_up(view: KernelView, store: FakeEtcd, count: int) -> None:
    """Take in the next `count` revisions."""
    for changes in store.since(view.revision)[:count]:
        view.apply(Changes([e for e in changes.events if e.kv.key.startswith(keys.kernel(K))], changes.revision))


MovingMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestMoving = MovingMachine.TestCase
