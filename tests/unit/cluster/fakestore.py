"""A small, faithful etcd in memory: revisions, transactions, leases and the history of events. For tests only."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbos_cluster.kv import KV, Changes, Compare, Event, Op, Snapshot, Txn, TxnResult


@dataclass
class FakeEtcd:
    revision: int = 1
    data: dict[str, KV] = field(default_factory=dict)
    leases: set[int] = field(default_factory=set)
    history: list[Changes] = field(default_factory=list)
    _next_lease: int = 100

    def grant(self) -> int:
        self._next_lease += 1
        self.leases.add(self._next_lease)
        return self._next_lease

    def expire(self, lease: int) -> None:
        """The lease ends; as in etcd, all its keys go in one revision."""
        self.leases.discard(lease)
        self._write([Op("delete", key) for key, kv in self.data.items() if kv.lease == lease])

    def commit(self, txn: Txn) -> TxnResult:
        succeeded = all(self._holds(compare) for compare in txn.compare)
        ops = txn.success if succeeded else txn.failure
        self._refuse_overlaps(ops)
        answers = [self._read(op) if op.kind == "get" else [] for op in ops]
        self._write([op for op in ops if op.kind != "get"])
        return TxnResult(succeeded, self.revision, answers)

    def snapshot(self, prefix: str) -> Snapshot:
        found = [kv for key, kv in sorted(self.data.items()) if key.startswith(prefix)]
        return Snapshot(found, self.revision)

    def since(self, revision: int) -> list[Changes]:
        return [changes for changes in self.history if changes.revision > revision]

    def _holds(self, compare: Compare) -> bool:
        kv = self.data.get(compare.key)
        if compare.target == "value":
            return kv is not None and kv.value == compare.operand
        if compare.target == "lease":
            return kv is not None and kv.lease == compare.operand
        have = 0 if kv is None else kv.create_revision if compare.target == "create" else kv.mod_revision
        assert isinstance(compare.operand, int)
        return have == compare.operand if compare.result == "=" else have > compare.operand

    def _keys(self, op: Op) -> list[str]:
        if not op.end:
            return [op.key] if op.key in self.data else []
        return sorted(key for key in self.data if op.key <= key < op.end)

    def _read(self, op: Op) -> list[KV]:
        found = [self.data[key] for key in self._keys(op)]
        if op.newest:
            found = found[-1:]
        if op.keys_only:
            found = [KV(kv.key, b"", kv.mod_revision, kv.create_revision, kv.lease) for kv in found]
        return found

    @staticmethod
    def _refuse_overlaps(ops: list[Op] | tuple[Op, ...]) -> None:
        puts = [op.key for op in ops if op.kind == "put"]
        assert len(set(puts)) == len(puts), "etcd: duplicate key given in txn request"
        for op in ops:
            if op.kind == "delete":
                assert not any(op.key <= key < op.end if op.end else op.key == key for key in puts)

    def _write(self, ops: list[Op]) -> None:
        revision, events = self.revision + 1, []
        for op in ops:
            if op.kind == "put":
                assert not op.lease or op.lease in self.leases, "etcd: requested lease not found"
                old = self.data.get(op.key)
                created = old.create_revision if old is not None else revision
                kv = KV(op.key, op.value, revision, created, op.lease)
                self.data[op.key] = kv
                events.append(Event("put", kv))
                continue
            for key in self._keys(op):
                del self.data[key]
                events.append(Event("delete", KV(key, b"", revision)))
        if events:
            self.revision = revision
            self.history.append(Changes(events, revision))
