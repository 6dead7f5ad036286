"""Which blobs may go, and how collecting and naming exclude each other. No IO; `collector` carries it out.

A blob may go when no log or checkpoint of any kernel of its owner names it, itself or through one of its tables (what
newer parts of the same checkpoint cover does not count: nobody reads it). What makes that safe is a fence per
owner's namespace in etcd: two keys, `lock` (under the collector's lease) and `fence` (never deleted).

- A collection begins by putting both in one transaction, reads all records of the owner *after* that, condemns what
  they do not name, and ends by deleting the lock and putting the fence again.
- Whoever makes a record name blobs first reads the fence, unlocked; then makes sure that every blob is in the store;
  then writes the record in a transaction that compares the fence and the missing lock. So either the record was there
  before the collection began, and is read by it; or the transaction fails, and the blobs are looked for anew.

No clock decides about safety. The period of grace only keeps blobs that were put and will be named soon from going in
vain; it is counted by the store's own clock. A condemned blob is set aside for another period and comes back when it
is wanted, so that even a collector that slept through its lease between two steps takes nothing away.
(tests/unit/daemon/test_collecting_machine.py tries to break it.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpu_daemon.blobs import Stored, folder_of
from nbos_cluster import keys, records, tables
from nbos_cluster.kernelview import kernel_of
from nbos_cluster.kv import KV, Txn, TxnResult, missing, mod_is, op_delete, op_get, op_put
from nbos_cluster.records import Checkpoint, Collection, KernelSpec, LogEntry, Table
from nbos_cluster.tables import Naming


@dataclass(frozen=True, slots=True)
class Fence:
    """revision: of the fence key, 0 before the first collection. lock: revision of the lock, 0 when nobody is at it."""

    revision: int
    lock: int = 0

    @property
    def locked(self) -> bool:
        return self.lock != 0


def look(folder: str) -> Txn:
    """Read the fence; its answer is for `read_fence`."""
    return Txn([], [op_get(keys.gc_fence(folder)), op_get(keys.gc_lock(folder))])


def read_fence(folder: str, answers: Sequence[Sequence[KV]]) -> Fence:
    fence, lock = answers
    return Fence(fence[0].mod_revision if fence else 0, lock[0].mod_revision if lock else 0)


def last_of(answers: Sequence[Sequence[KV]]) -> Collection | None:
    """The last collection, from the answer to `look`."""
    return records.decode(answers[0][0].value, Collection) if answers[0] else None


def fenced(folder: str, fence: Fence, txn: Txn) -> Txn:
    """`txn`, only while the fence is what it was; on failure the last two answers are its state now."""
    unchanged = [mod_is(keys.gc_fence(folder), fence.revision), missing(keys.gc_lock(folder))]
    return Txn([*txn.compare, *unchanged], txn.success, [*txn.failure, *look(folder).success])


def begin(folder: str, fence: Fence, host: str, lease: int, last: Collection | None) -> Txn:
    """Start a collection, unless another goes on or went on since `fence` was read."""
    mark = records.encode(last or Collection(host=host))
    lock = records.encode(Collection(host=host))
    return Txn(
        [mod_is(keys.gc_fence(folder), fence.revision), missing(keys.gc_lock(folder))],
        [op_put(keys.gc_fence(folder), mark), op_put(keys.gc_lock(folder), lock, lease)],
    )


def begun(result: TxnResult) -> int | None:
    """The token (revision of the lock) of the collection that `begin` started; None when it did not."""
    return result.revision if result.succeeded else None


def still_ours(folder: str, token: int) -> Txn:
    """Whether the lock is still there: asked after the records were read, before anything is condemned."""
    return Txn([mod_is(keys.gc_lock(folder), token)], [])


def end(folder: str, token: int, done: Collection) -> Txn:
    """The collection is over, well or not; appends that waited go on."""
    return Txn(
        [mod_is(keys.gc_lock(folder), token)],
        [op_delete(keys.gc_lock(folder)), op_put(keys.gc_fence(folder), records.encode(done))],
    )


def tables_of(kvs: Iterable[KV], folder: str) -> dict[Table, str]:
    """Every table of a record of the namespace's owner, and who that is: to be read before `named` is asked."""
    owners, found = _of_folder(kvs, folder)
    every = set(owners.values())
    return {
        table: owners.get(kernel) or next(iter(every), "")
        for kernel, record in found
        for table in tables.tables_of(record)
    }


def named(kvs: Iterable[KV], folder: str, namings: Mapping[Table, Naming] | None = None) -> set[str]:
    """Every blob that a record of the namespace's owner names, itself or through a table. `kvs`: all records of
    kernels, of one revision; `namings`: what the tables among `tables_of` name.

    Raises RecordError when one cannot be read: then nobody knows what it names, and nothing may go. A kernel without
    a spec may be anybody's.
    """
    known = namings or {}
    found: set[str] = set()
    for _, record in _of_folder(kvs, folder)[1]:
        found |= tables.blobs_needed(record, [known[table] for table in tables.tables_of(record)])
    return found


def _of_folder(kvs: Iterable[KV], folder: str) -> tuple[dict[str, str], list[tuple[str, Checkpoint | LogEntry]]]:
    """The owners by kernel, and (kernel, record) of everything that can name blobs there."""
    owners: dict[str, str] = {}
    found: list[tuple[str, Checkpoint | LogEntry]] = []
    for kv in kvs:
        kernel = kernel_of(kv.key)
        kind = kv.key[len(keys.kernel(kernel)) :].partition("/")[0]
        if kind == "spec":
            owners[kernel] = records.decode(kv.value, KernelSpec).owner
        elif kind == "log":
            found.append((kernel, records.decode(kv.value, LogEntry)))
        elif kind == "checkpoint":
            found.append((kernel, records.decode(kv.value, Checkpoint)))
    ours = {kernel: owner for kernel, owner in owners.items() if folder_of(owner) == folder}
    return ours, [(kernel, record) for kernel, record in found if kernel in ours or kernel not in owners]


@dataclass(frozen=True, slots=True)
class Plan:
    """condemn: sound blobs that nothing names. restore: condemned ones that something names. remove: condemned long
    enough ago, damaged, or left behind by a crash."""

    condemn: tuple[Stored, ...] = ()
    restore: tuple[Stored, ...] = ()
    remove: tuple[Stored, ...] = ()
    kept: int = 0
    kept_bytes: int = 0


def plan(stored: Iterable[Stored], named: set[str], now: float, grace: float, most: int = 2000) -> Plan:
    """What to do with everything in a namespace; at most `most` steps, so that appends never wait long."""
    items = list(stored)
    sound = {item.address for item in items if item.address and not item.condemned}
    condemn: list[Stored] = []
    restore: list[Stored] = []
    remove: list[Stored] = []
    kept = size = 0
    for item in items:
        old = now - item.at > grace and len(condemn) + len(remove) < most
        if item.condemned and item.address in named and item.address not in sound:
            restore.append(item)
        elif item.condemned or not item.address:
            remove.extend([item] if old else [])
        elif item.address not in named and old:
            condemn.append(item)
        else:
            kept, size = kept + 1, size + item.size
    return Plan(tuple(condemn), tuple(restore), tuple(remove), kept, size)
