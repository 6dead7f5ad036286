"""Collecting against everything at once: puts, appends, folds, deleted kernels, crashes and collectors that overslept.

A model of the store with the real decisions (`collecting`), a faithful etcd in memory, and each process cut into the
steps between which others may run. Whatever happens: no blob that a record names, itself or through a table, is ever
gone; in particular when a daemon dies between writing a table and the record that names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_daemon import collecting
from gpu_daemon.blobs import Stored, folder_of
from gpu_daemon.collecting import Fence, Plan
from nbos_cluster import keys, records, statelog, tables
from nbos_cluster.kv import Snapshot, Txn, exists, missing, mod_is, op_delete_prefix, op_put
from nbos_cluster.records import Checkpoint, Collection, Component, Frame, KernelSpec, LogEntry, Table
from nbos_cluster.tables import Contents
from tests.unit.cluster.fakestore import FakeEtcd

OWNER = "ann"
FOLDER = folder_of(OWNER)
GRACE = 10.0
BLOBS = [f"{i:064x}" for i in range(3)]
KERNELS = ["k1", "k2"]

blobs = st.sampled_from(BLOBS)
kernels = st.sampled_from(KERNELS)


@dataclass
class Store:
    """`sound` and `aside` (`.old`) blobs, when they were last put. keeps: what is brought back is copied (S3)."""

    keeps: bool = False
    sound: dict[str, float] = field(default_factory=dict)
    aside: dict[str, float] = field(default_factory=dict)

    def there(self, blob: str) -> bool:
        return blob in self.sound or blob in self.aside

    def have(self, blob: str, now: float) -> bool:
        if blob not in self.sound and blob in self.aside:
            if not self.keeps:
                del self.aside[blob]
            self.sound[blob] = now
        if blob in self.sound:
            self.sound[blob] = now
        return blob in self.sound

    def contents(self) -> list[Stored]:
        sound = [Stored(b, b, 1, at) for b, at in self.sound.items()]
        return sound + [Stored(b + ".old", b, 1, at, condemned=True) for b, at in self.aside.items()]


@dataclass
class Writer:
    """An append on its way: which blobs, what was seen under which fence. tabled: it names them through a table."""

    kernel: str
    blobs: list[str]
    tabled: bool = False
    fence: Fence | None = None
    secured: bool = False

    def entry(self, n: int) -> tuple[LogEntry, dict[str, bytes]]:
        frame = Frame(size=1, blobs=tuple(self.blobs))
        component = Component(names=(f"x{len(self.blobs)}",), digest="d", frames=(frame,))
        entry = LogEntry(n=n, kind="cell", components=(component,))
        return tables.put_outside(entry, ()) if self.tabled else (entry, {})


@dataclass
class Fold:
    """A fold on its way, which pushes everything into a table: what it will write, and its blobs."""

    kernel: str
    old_rev: int
    state: Checkpoint
    blobs: dict[str, bytes]
    upto_rev: int
    stored: bool = False
    fence: Fence | None = None
    secured: bool = False


@dataclass
class Sweep:
    lease: int
    token: int
    stored: list[Stored] | None = None
    plan: Plan | None = None
    steps: list[tuple[str, Stored]] = field(default_factory=list)


class Collecting(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.etcd, self.store, self.now = FakeEtcd(), Store(), 0.0
        self.writers: list[Writer] = []
        self.folds: list[Fold] = []
        self.bytes: dict[str, bytes] = {}
        self.sweep: Sweep | None = None
        self.zombies: list[tuple[str, Stored]] = []
        for kernel in KERNELS:
            self._create(kernel)

    def _create(self, kernel: str) -> None:
        spec = KernelSpec(
            kernel=kernel, owner=OWNER, replicas=1, placement={"0": "a"}, key="", curve_publickey="", curve_secretkey=""
        )
        origin = LogEntry(n=0, kind="origin")
        self.etcd.commit(
            Txn(
                [missing(keys.spec(kernel))],
                [
                    op_put(keys.spec(kernel), records.encode(spec)),
                    op_put(keys.log_entry(kernel, 0), records.encode(origin)),
                ],
            )
        )

    @initialize(keeps=st.booleans())
    def kind_of_store(self, keeps: bool) -> None:
        self.store.keeps = keeps

    # -- those who write ----------------------------------------------------------------------------------------------

    @rule(blob=blobs)
    def put(self, blob: str) -> None:
        self.store.sound[blob] = self.now

    @rule(kernel=kernels, some=st.lists(blobs, min_size=1, max_size=3, unique=True), tabled=st.booleans())
    def append_begins(self, kernel: str, some: list[str], tabled: bool) -> None:
        if len(self.writers) < 3:
            self.writers.append(Writer(kernel, some, tabled))

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def append_goes_on(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        if writer.fence is None:
            fence = collecting.read_fence(FOLDER, self.etcd.commit(collecting.look(FOLDER)).responses)
            writer.fence = None if fence.locked else fence
        elif not writer.secured:
            log = self._log(writer.kernel)
            if not log:  # deleted; its claim ended with it, so that this append never comes to a kernel of the same id
                self.writers.remove(writer)
                return
            table = writer.entry(max(log) + 1)[1]
            self.bytes.update(table)
            for blob in (*writer.blobs, *table):
                if not self.store.have(blob, self.now):
                    self.store.sound[blob] = self.now  # `blobs_missing`: the replica puts it again
            writer.secured = True
        else:
            self._commit(writer, writer.fence)

    def _commit(self, writer: Writer, fence: Fence) -> None:
        log = self._log(writer.kernel)
        if not log:
            self.writers.remove(writer)
            return
        n = max(log) + 1
        entry, table = writer.entry(n)
        self.bytes.update(table)
        txn = Txn(
            [exists(keys.log_entry(writer.kernel, n - 1)), missing(keys.log_entry(writer.kernel, n))],
            [op_put(keys.log_entry(writer.kernel, n), records.encode(entry))],
        )
        result = self.etcd.commit(collecting.fenced(FOLDER, fence, txn))
        if result.succeeded:
            self.writers.remove(writer)
        elif collecting.read_fence(FOLDER, result.responses[-2:]) != fence:
            writer.fence, writer.secured = None, False

    @rule(kernel=kernels)
    def fold(self, kernel: str) -> None:
        log = self._log(kernel)
        if len(log) < 2:
            return
        new, old_rev, upto_rev = self._folded(kernel, log)
        assert self.etcd.commit(statelog.fold_txn(kernel, old_rev, new, new.upto, upto_rev=upto_rev)).succeeded

    def _folded(self, kernel: str, log: dict[int, LogEntry]) -> tuple[Checkpoint, int, int]:
        kv = self.etcd.data.get(keys.checkpoint(kernel))
        old = records.decode(kv.value, Checkpoint) if kv is not None else None
        upto = max(log) - 1
        entries = [self._opened(log[n]) for n in sorted(log) if n <= upto]
        upto_rev = self.etcd.data[keys.log_entry(kernel, upto)].mod_revision
        return statelog.fold(old, entries), kv.mod_revision if kv is not None else 0, upto_rev

    def _read(self, table: Table) -> Contents:
        """As a daemon reads it: it must be there."""
        assert all(self.store.there(digest) for digest in table.blobs), "a table that a record names is gone"
        return tables.decode(table, b"".join(self.bytes[digest] for digest in table.blobs))

    def _opened(self, entry: LogEntry) -> LogEntry:
        return entry if entry.table is None else tables.put_inside(entry, self._read(entry.table))

    @rule(kernel=kernels, data=st.data())
    def fold_into_a_table_begins(self, kernel: str, data: st.DataObject) -> None:
        log = self._log(kernel)
        if len(log) < 2 or len(self.folds) >= 2:
            return
        state, old_rev, upto_rev = self._folded(kernel, log)
        count = data.draw(st.integers(0, len(state.tables)))
        newest = state.tables[len(state.tables) - count :]
        state, made = tables.push(state, [self._read(table) for table in newest])
        self.folds.append(Fold(kernel, old_rev, state, made, upto_rev))

    @precondition(lambda self: self.folds)
    @rule(data=st.data())
    def fold_goes_on(self, data: st.DataObject) -> None:
        fold = data.draw(st.sampled_from(self.folds))
        if not fold.stored:
            self.bytes.update(fold.blobs)
            self.store.sound.update(dict.fromkeys(fold.blobs, self.now))
            fold.stored = True
        elif fold.fence is None:
            fence = collecting.read_fence(FOLDER, self.etcd.commit(collecting.look(FOLDER)).responses)
            fold.fence = None if fence.locked else fence
        elif not fold.secured:
            # Not there any more: the fold fails with `blobs_missing`, and is tried again after a later entry.
            fold.secured = {blob for blob in fold.blobs if self.store.have(blob, self.now)} == set(fold.blobs)
            if not fold.secured:
                self.folds.remove(fold)
        else:
            txn = statelog.fold_txn(fold.kernel, fold.old_rev, fold.state, fold.state.upto, upto_rev=fold.upto_rev)
            txn = collecting.fenced(FOLDER, fold.fence, txn) if fold.blobs else txn
            result = self.etcd.commit(txn)
            if result.succeeded or not fold.blobs or collecting.read_fence(FOLDER, result.responses[-2:]) == fold.fence:
                self.folds.remove(fold)
            else:
                fold.fence, fold.secured = None, False

    @precondition(lambda self: self.folds)
    @rule(data=st.data())
    def daemon_is_killed_while_it_folds(self, data: st.DataObject) -> None:
        self.folds.remove(data.draw(st.sampled_from(self.folds)))

    @rule(kernel=kernels)
    def delete_kernel(self, kernel: str) -> None:
        self.etcd.commit(Txn([], [op_delete_prefix(keys.kernel(kernel))]))

    @rule(kernel=kernels)
    def create_kernel(self, kernel: str) -> None:
        self._create(kernel)

    # -- the collector ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.sweep is None)
    @rule()
    def collect_begins(self) -> None:
        answers = self.etcd.commit(collecting.look(FOLDER)).responses
        fence = collecting.read_fence(FOLDER, answers)
        lease = self.etcd.grant()
        if fence.locked:
            return
        begin = collecting.begin(FOLDER, fence, "a", lease, collecting.last_of(answers))
        token = collecting.begun(self.etcd.commit(begin))
        if token is not None:
            self.sweep = Sweep(lease, token)

    @precondition(lambda self: self.sweep is not None)
    @rule()
    def collect_goes_on(self) -> None:
        sweep = self.sweep
        assert sweep is not None
        if sweep.stored is None:
            sweep.stored = self.store.contents()
        elif sweep.plan is None:
            named = self._named()
            sweep.plan = collecting.plan(sweep.stored, named, self.now, GRACE)
            if not self.etcd.commit(collecting.still_ours(FOLDER, sweep.token)).succeeded:
                self.sweep = None
                return
            plan = sweep.plan
            sweep.steps = [("restore", i) for i in plan.restore] + [("condemn", i) for i in plan.condemn]
            sweep.steps += [("remove", i) for i in plan.remove]
        elif sweep.steps:
            if sweep.lease in self.etcd.leases:
                self._step(*sweep.steps.pop(0))
            else:
                self.sweep = None
        else:
            self.etcd.commit(collecting.end(FOLDER, sweep.token, Collection(host="a", at=self.now)))
            self.sweep = None

    @precondition(lambda self: self.sweep is None)
    @rule()
    def a_period_of_grace_and_a_whole_collection(self) -> None:
        self.now += GRACE + 1
        self.collect_begins()
        while self.sweep is not None:
            self.collect_goes_on()

    @precondition(lambda self: self.sweep is not None)
    @rule()
    def collector_dies(self) -> None:
        assert self.sweep is not None
        lease, self.sweep = self.sweep.lease, None
        self.etcd.expire(lease)

    @precondition(lambda self: self.sweep is not None and self.sweep.steps and not self.zombies)
    @rule()
    def collector_oversleeps(self) -> None:
        """Right before a step, for so long that its lease ends; it wakes up at any time and carries that step out."""
        assert self.sweep is not None
        self.zombies = self.sweep.steps[:1]
        self.etcd.expire(self.sweep.lease)
        self.sweep = None

    @precondition(lambda self: self.zombies)
    @rule()
    def overslept_step(self) -> None:
        self._step(*self.zombies.pop())

    def _step(self, kind: str, item: Stored) -> None:
        if kind == "condemn" and item.address in self.store.sound:
            del self.store.sound[item.address]
            self.store.aside[item.address] = self.now
        elif kind == "restore" and item.address in self.store.aside:
            self.store.have(item.address, self.now)
        elif kind == "remove" and item.condemned:
            self.store.aside.pop(item.address, None)

    @rule(seconds=st.sampled_from([1.0, GRACE + 1, 3 * GRACE]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def no_named_blob_is_gone(self) -> None:
        for blob in self._named():
            assert self.store.there(blob), blob

    @invariant()
    def whoever_starts_from_a_checkpoint_finds_its_values(self) -> None:
        for kernel in KERNELS:
            kv = self.etcd.data.get(keys.checkpoint(kernel))
            if kv is not None:
                state = records.decode(kv.value, Checkpoint)
                for component in tables.whole(state, [self._read(table) for table in state.tables]).components:
                    assert all(self.store.there(blob) for frame in component.frames for blob in frame.blobs)

    def _named(self) -> set[str]:
        kvs = self.etcd.snapshot(keys.KERNELS).kvs
        found = collecting.tables_of(kvs, FOLDER)
        assert set(found.values()) <= {OWNER}
        return collecting.named(kvs, FOLDER, {table: tables.naming(self._read(table)) for table in found})

    def _log(self, kernel: str) -> dict[int, LogEntry]:
        found = self.etcd.snapshot(keys.log(kernel)).kvs
        return {e.n: e for e in (records.decode(kv.value, LogEntry) for kv in found)}

    def teardown(self) -> None:
        """In the end garbage does go: two quiet collections, each a period of grace later, leave only what is named."""
        self.sweep, self.zombies, self.writers, self.folds = None, [], [], []
        for lease in list(self.etcd.leases):
            self.etcd.expire(lease)
        for _ in range(3):
            self.a_period_of_grace_and_a_whole_collection()
        assert {i.address for i in self.store.contents()} == self._named()


Collecting.TestCase.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)
TestCollecting = Collecting.TestCase


def test_without_the_fence_the_machine_finds_the_loss() -> None:
    """The order that the fence forbids: seen, collected, named."""
    etcd, store = FakeEtcd(), Store(sound={BLOBS[0]: 0.0})
    fence = collecting.read_fence(FOLDER, etcd.commit(collecting.look(FOLDER)).responses)
    assert store.have(BLOBS[0], 0.0)
    lease = etcd.grant()
    token = collecting.begun(etcd.commit(collecting.begin(FOLDER, fence, "a", lease, None)))
    assert token is not None
    named = collecting.named(Snapshot([], 1).kvs, FOLDER)
    assert collecting.plan(store.contents(), named, GRACE + 1, GRACE).condemn
    etcd.commit(collecting.end(FOLDER, token, Collection(host="a")))
    txn = Txn([mod_is(keys.checkpoint("k1"), 0)], [op_put(keys.checkpoint("k1"), b"")])
    assert etcd.commit(txn.__class__(txn.compare, [])).succeeded
    assert not etcd.commit(collecting.fenced(FOLDER, fence, txn)).succeeded
