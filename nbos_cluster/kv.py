"""etcd's words as plain data, so that every decision about records can be made without a connection.

Election, state log, membership and views return a `Txn` and are told what came of it; `nbos_cluster.etcd`
carries it out. Keys are text, values bytes. A revision that a key does not have is 0, as in etcd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class KV:
    """One key as etcd holds it. lease is 0 where none keeps it; value is empty where only the key was asked
    for."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int = 0
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction. With result '>' the key's number must be above `operand`."""

    key: str
    target: Literal["create", "mod", "value", "lease"]
    result: Literal["=", ">"]
    operand: int | bytes


def missing(key: str) -> Compare:
    return Compare(key, "create", "=", 0)


def exists(key: str) -> Compare:
    return Compare(key, "create", ">", 0)


def mod_is(key: str, revision: int) -> Compare:
    """True while the key is exactly the one last written at `revision` (0: while it does not exist)."""
    return Compare(key, "mod", "=", revision)


def created_at(key: str, revision: int) -> Compare:
    """True while the key is still the one made at `revision`, however often it was written since."""
    return Compare(key, "create", "=", revision)


def lease_is(key: str, lease: int) -> Compare:
    """True while the key exists and is kept by this lease, so written by the lease's owner."""
    return Compare(key, "lease", "=", lease)


def value_is(key: str, value: bytes) -> Compare:
    return Compare(key, "value", "=", value)


@dataclass(frozen=True, slots=True)
class Op:
    """One step of a transaction, on `key` alone or on [key, end). newest: only the last key of the range."""

    kind: Literal["put", "delete", "get"]
    key: str
    end: str = ""
    value: bytes = b""
    lease: int = 0
    keys_only: bool = False
    newest: bool = False


def op_put(key: str, value: bytes, lease: int = 0) -> Op:
    return Op("put", key, value=value, lease=lease)


def op_delete(key: str) -> Op:
    return Op("delete", key)


def op_delete_prefix(prefix: str) -> Op:
    return Op("delete", prefix, prefix_end(prefix))


def op_delete_range(first: str, end: str) -> Op:
    """Deletes the keys from `first` up to, not including, `end`."""
    return Op("delete", first, end)


def op_get(key: str, *, keys_only: bool = False) -> Op:
    return Op("get", key, keys_only=keys_only)


def op_newest(prefix: str) -> Op:
    """Reads the last key under `prefix`, without its value."""
    return Op("get", prefix, prefix_end(prefix), keys_only=True, newest=True)


@dataclass(frozen=True, slots=True)
class Txn:
    """`success` happens, all at once, when every comparison holds; `failure` otherwise."""

    compare: Sequence[Compare]
    success: Sequence[Op]
    failure: Sequence[Op] = ()


@dataclass(frozen=True, slots=True)
class TxnResult:
    """responses: what each step of the branch taken read; empty for puts and deletes."""

    succeeded: bool
    revision: int
    responses: Sequence[Sequence[KV]] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """A change of one key. For 'delete', kv holds the key and the revision of its end only."""

    kind: Literal["put", "delete"]
    kv: KV


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything under a prefix at one revision; replaces what a reader knew before."""

    kvs: Sequence[KV]
    revision: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened after the last Snapshot or Changes, in order; a transaction is never torn between two."""

    events: Sequence[Event]
    revision: int


def prefix_end(prefix: str) -> str:
    """The first key that sorts after every key beginning with `prefix` (keys are ASCII, see `keys`)."""
    if not prefix:
        raise ValueError("an empty prefix would mean the whole of etcd; name one")
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)
