"""Transactions that only a daemon makes, besides those of `nbos_cluster.election`. No IO."""

from __future__ import annotations

from nbos_cluster import election, keys
from nbos_cluster.kv import Op, Txn, mod_is, op_delete, op_put
from nbos_cluster.records import GrantRecord, encode


def grant_key(grant: GrantRecord | None) -> str:
    return keys.grant(grant.host, grant.grant) if grant is not None else ""


def withdraw(kernel: str, n: int, token: int, grant: GrantRecord | None) -> Txn:
    """End a claim under which nothing ran: n is free again. Nothing happens when the claim is another one by now."""
    ends = [op_delete(keys.claim(kernel, n))]
    return Txn([mod_is(keys.claim(kernel, n), token)], ends + _end_grant(grant), _end_grant(grant))


def abandon_held(
    kernel: str, n: int, token: int, reason: str, *, grant: GrantRecord | None, incarnation: int, at: float
) -> Txn:
    """Abandon n and end its claim and grant in one step. Read the outcome with `election.classify_abandon`."""
    txn = election.abandon(kernel, n, reason, token, incarnation=incarnation, at=at)
    return Txn(txn.compare, [*txn.success, *_end_grant(grant)], txn.failure)


def grant_within(kernel: str, n: int, token: int, grant: GrantRecord, lease: int) -> Txn:
    """A grant for an execution that runs already: put only while its claim stands, and under the claim's lease, so
    that it ends no later than that. May be carried out twice. The claim keeps its revision, which is the token."""
    return Txn(
        [mod_is(keys.claim(kernel, n), token)], [op_put(keys.grant(grant.host, grant.grant), encode(grant), lease)], []
    )


def end_grant(grant: GrantRecord) -> Txn:
    return Txn([], _end_grant(grant))


def _end_grant(grant: GrantRecord | None) -> list[Op]:
    return [op_delete(grant_key(grant))] if grant is not None else []
