"""Who runs execution n, decided by etcd transactions that are only written and read here, without IO.

Guarantees, for one kernel (promises 1 and 2):
- at most one claim of n exists, and none once n is decided;
- only the holder of the claim, known by its token (the claim's revision), appends entry n;
- an append may claim n+1 for the same replica (`Ahead`): it happens with the entry, or neither does;
- n is claimed only while entry n-1 is in the log, so the log has no gap. The newest entry is never folded
  away (`statelog.fold_txn`), and entry 0 is written when the kernel is made (`membership.create`);
- a restart by the user deletes the claims, so what the old incarnation still runs can no longer be appended.

Every transaction may be carried out twice (the member that answered may have died before its answer came):
the `classify` functions recognise what their own first try has done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from . import keys, records
from .kv import KV, Txn, TxnResult, exists, missing, mod_is, op_delete, op_get, op_newest, op_put, value_is
from .records import ClaimRecord, Epoch, GrantRecord, LogEntry

LostCode = Literal["taken", "stale", "behind", "epoch"]


@dataclass(frozen=True, slots=True)
class Won:
    """The claim is ours; its revision is the fencing token of the execution."""

    token: int


@dataclass(frozen=True, slots=True)
class Lost:
    """taken: another replica holds n. stale: n is decided, `next` is free. behind: entry n-1 is not in the
    log yet. epoch: the membership changed (or the kernel is gone); look again. `holder` is the claim that was
    in the way."""

    code: LostCode
    next: int | None
    reason: str
    holder: ClaimRecord | None = None


@dataclass(frozen=True, slots=True)
class Appended:
    revision: int


@dataclass(frozen=True, slots=True)
class AlreadyThere:
    """This very entry was appended before; the answer was lost on the way."""

    revision: int


@dataclass(frozen=True, slots=True)
class Fenced:
    """The claim is not held any more; nothing was written. decided: another entry n stands in the log."""

    reason: str
    decided: bool = False


@dataclass(frozen=True, slots=True)
class EpochMoved:
    """The claim stands and nothing was written: n+1 was to be claimed with the entry under an epoch of before."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """Claim the next execution with an entry, under this epoch and lease. Its token is the entry's revision."""

    claim: ClaimRecord
    epoch: Epoch
    lease: int


def claim(
    kernel: str, n: int, *, epoch: Epoch, claim: ClaimRecord, grant: GrantRecord | None = None, lease: int
) -> Txn:
    """Make claim.replica the executor of n, with its grant, both under the daemon's lease.

    Succeeds only while n is neither claimed nor decided, n-1 is in the log and the epoch is still `epoch`.
    """
    return _claim(kernel, n, epoch, claim, grant, lease)


def renew_claim(
    kernel: str, n: int, *, epoch: Epoch, claim: ClaimRecord, grant: GrantRecord | None = None, lease: int
) -> Txn:
    """Claim n again for the execution that still runs, after the daemon's lease was lost. The token changes.

    The same conditions as a first claim: whoever claimed n meanwhile, or decided it, keeps it. A replica that
    is no member any more must not renew; the caller gives the epoch under which it saw itself as a member.
    """
    return _claim(kernel, n, epoch, claim, grant, lease)


def _claim(kernel: str, n: int, epoch: Epoch, record: ClaimRecord, grant: GrantRecord | None, lease: int) -> Txn:
    if record.n != n or n < 1:
        raise ValueError(f"the claim record is for execution {record.n}, the claim for {n} (from 1 on)")
    claim_key, log_key = keys.claim(kernel, n), keys.log_entry(kernel, n)
    epoch_key, before = keys.epoch(kernel), keys.log_entry(kernel, n - 1)
    success = [op_put(claim_key, records.encode(record), lease)]
    if grant is not None:
        success.append(op_put(keys.grant(grant.host, grant.grant), records.encode(grant), lease))
    return Txn(
        [missing(claim_key), missing(log_key), value_is(epoch_key, records.encode(epoch)), exists(before)],
        success,
        [op_get(claim_key), op_get(epoch_key), op_get(before, keys_only=True), op_newest(keys.log(kernel))],
    )


def classify(n: int, result: TxnResult, mine: ClaimRecord | None = None) -> Won | Lost:
    """What came of `claim` or `renew_claim`. With `mine` given, our own claim from a first try counts as
    won."""
    if result.succeeded:
        return Won(result.revision)
    claim_kv, epoch_kv, before, newest = (_only(found) for found in result.responses)
    if claim_kv is not None and mine is not None and claim_kv.value == records.encode(mine):
        return Won(claim_kv.mod_revision)
    if epoch_kv is None or newest is None:
        return Lost("epoch", None, "the kernel is gone")
    last = number_of(newest.key)
    if last >= n:
        return Lost("stale", last + 1, f"execution {n} is decided already, the next is {last + 1}")
    if claim_kv is not None:
        return _taken(n, claim_kv)
    if before is None:
        return Lost("behind", last + 1, f"entry {n - 1} is not in the log yet, the newest is {last}")
    return Lost("epoch", None, "the kernel's membership changed meanwhile")


def append(kernel: str, entry: LogEntry, token: int, *, grant_key: str = "", ahead: Ahead | None = None) -> Txn:
    """Write entry n and end its claim (and, where `grant_key` is given, its grant), if the claim still has
    `token`. With `ahead`, claim n+1 as well, if the epoch is still that one; nobody can hold or decide n+1 before.

    A grant released earlier is no hindrance. A restart by the user deletes the claim, so the incarnation
    needs no comparison of its own.
    """
    if entry.token != token:
        raise ValueError(f"entry {entry.n} carries token {entry.token}, the claim has {token}; put the claim's in")
    log_key, claim_key = keys.log_entry(kernel, entry.n), keys.claim(kernel, entry.n)
    success = [op_put(log_key, records.encode(entry)), op_delete(claim_key)]
    if grant_key:
        success.append(op_delete(grant_key))
    compare = [mod_is(claim_key, token), missing(log_key)]
    if ahead is not None:
        if ahead.claim.n != entry.n + 1:
            raise ValueError(f"entry {entry.n} can claim {entry.n + 1} ahead, not {ahead.claim.n}")
        compare.append(value_is(keys.epoch(kernel), records.encode(ahead.epoch)))
        success.append(op_put(keys.claim(kernel, ahead.claim.n), records.encode(ahead.claim), ahead.lease))
    return Txn(
        compare,
        success,
        [op_get(claim_key), op_get(log_key), op_newest(keys.log(kernel))],
    )


def classify_append(n: int, token: int, result: TxnResult) -> Appended | AlreadyThere | EpochMoved | Fenced:
    """What came of `append`; after Appended and AlreadyThere, entry n is in the log and is ours. EpochMoved only with
    `ahead`: append without."""
    if result.succeeded:
        return Appended(result.revision)
    claim_kv, log_kv, newest = (_only(found) for found in result.responses)
    if log_kv is not None:
        there = records.decode(log_kv.value, LogEntry)
        if there.token == token and there.kind not in ("abandoned", "reset"):
            return AlreadyThere(log_kv.mod_revision)
        return Fenced(_decided(n, there), decided=True)
    if newest is None:
        return Fenced("the kernel is gone", decided=True)
    if number_of(newest.key) > n:
        return Fenced(f"execution {n} was decided long ago and its entry is folded", decided=True)
    if claim_kv is not None and claim_kv.mod_revision == token:
        return EpochMoved()
    if claim_kv is not None:
        return Fenced(_taken(n, claim_kv).reason)
    return Fenced(f"the claim of execution {n} ended with its lease")


def abandon(
    kernel: str,
    n: int,
    reason: str,
    claim_token: int | None = None,
    *,
    incarnation: int = 1,
    source: str = "",
    at: float = 0.0,
) -> Txn:
    """Decide that n changes nothing, and why; the user must be told.

    Without `claim_token` nobody may hold n; with it, that claim must still be the one held, and it ends.
    Read the outcome with `classify_abandon`.
    """
    log_key, claim_key = keys.log_entry(kernel, n), keys.claim(kernel, n)
    entry = LogEntry(n=n, kind="abandoned", incarnation=incarnation, status="aborted", source=source,
                     reason=reason, at=at)  # fmt: skip
    held = missing(claim_key) if claim_token is None else mod_is(claim_key, claim_token)
    success = [op_put(log_key, records.encode(entry))]
    if claim_token is not None:
        success.append(op_delete(claim_key))
    return Txn(
        [held, missing(log_key), exists(keys.log_entry(kernel, n - 1))],
        success,
        [op_get(claim_key), op_get(log_key), op_newest(keys.log(kernel))],
    )


def classify_abandon(n: int, result: TxnResult) -> Appended | AlreadyThere | Fenced:
    """What came of `abandon`. AlreadyThere: n was abandoned before. Fenced says what stood in the way."""
    if result.succeeded:
        return Appended(result.revision)
    claim_kv, log_kv, newest = (_only(found) for found in result.responses)
    if log_kv is not None:
        there = records.decode(log_kv.value, LogEntry)
        if there.kind == "abandoned":
            return AlreadyThere(log_kv.mod_revision)
        return Fenced(_decided(n, there), decided=True)
    if newest is None:
        return Fenced("the kernel is gone", decided=True)
    if claim_kv is not None:
        return Fenced(_taken(n, claim_kv).reason)
    last = number_of(newest.key)
    return Fenced(f"execution {n} cannot be abandoned: the newest entry is {last}", decided=last > n)


def number_of(key: str) -> int:
    """The execution number at the end of a claim's or an entry's key."""
    return int(key.rpartition("/")[2])


def _only(found: Sequence[KV]) -> KV | None:
    return found[0] if found else None


def _taken(n: int, kv: KV) -> Lost:
    holder = records.decode(kv.value, ClaimRecord)
    return Lost("taken", None, f"replica {holder.replica} on {holder.host} holds execution {n}", holder)


def _decided(n: int, entry: LogEntry) -> str:
    why = f" ({entry.reason})" if entry.reason else ""
    return f"execution {n} was decided by another: {entry.kind}{why}"
