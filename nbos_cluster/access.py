"""Who may read and write what in etcd, as plain data: the roles of the cluster and the keys each needs. No IO.

A process is known to etcd by the common name of its certificate, which is the name of a user of etcd; that user has
the role of the same name and nothing else. `nbos_cluster.etcdauth` brings an etcd to this state. The tables below are
all that the processes' code asks for (tests/system/test_access.py tries every line of it, and what is not in it).

What etcd cannot express: permissions are ranges of keys, and a kernel's records stand under the kernel's id. A daemon
must claim for, append to and fold whatever kernel is placed on it, today or tomorrow, so it may write the records of
all kernels. Its host record, grants, queue and accounts are its alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from . import keys
from .kv import prefix_end

ROOT = "root"
"""etcd's own name for the user that may do everything: the admin's certificate."""
GATEWAY = "gateway"
READER = "reader"
MEMBER = "etcd-member"
"""Common name of all etcd members' certificates. No user of etcd has this name, so that a member's key opens no key."""
_DAEMON = "daemon-"

Kind = Literal["read", "write", "readwrite"]


@dataclass(frozen=True, slots=True, order=True)
class Permission:
    """On `key` alone, or on [key, end)."""

    kind: Kind
    key: str
    end: str = ""


def daemon_user(host: str) -> str:
    return _DAEMON + keys.checked(host, "host")


def host_of(user: str) -> str:
    """The host whose daemon the user is; '' when it is none."""
    return user.removeprefix(_DAEMON) if user.startswith(_DAEMON) else ""


def roles(hosts: Iterable[str]) -> dict[str, frozenset[Permission]]:
    """Every role but root's, by name."""
    return {GATEWAY: gateway(), READER: reader()} | {daemon_user(host): daemon(host) for host in hosts}


def gateway() -> frozenset[Permission]:
    """Makes, places, restarts and deletes kernels; says who is expected; sees hosts, queues and accounts."""
    return frozenset(
        {
            _all("readwrite", keys.KERNELS),
            _all("read", keys.HOSTS),
            _all("read", keys.QUEUES),
            _all("read", keys.ACCOUNTS),
            _all("write", keys.EXPECTED),
        },
    )


def daemon(host: str) -> frozenset[Permission]:
    """Its own host, grants, queue and accounts; the records of kernels; the fences and locks of collecting. Sees all
    hosts, and who is expected."""
    return frozenset(
        {
            _all("read", keys.HOSTS),
            Permission("readwrite", keys.host(host)),
            _all("readwrite", keys.grants(host)),
            _all("readwrite", keys.queue(host)),
            _all("readwrite", keys.KERNELS),
            _all("readwrite", keys.GC),
            _all("readwrite", keys.accounts(host)),
            _all("read", keys.EXPECTED),
        }
    )


def reader() -> frozenset[Permission]:
    """For monitoring: hosts with their devices, grants, who waits. No kernel's records: they hold keys and code."""
    return frozenset({_all("read", keys.HOSTS), _all("read", keys.QUEUES), _all("read", keys.GC)})


def _all(kind: Kind, prefix: str) -> Permission:
    return Permission(kind, prefix, prefix_end(prefix))
