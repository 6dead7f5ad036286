"""The names of the records in etcd: the only module that knows how a key is spelt.

Every key stands under `/nbos/v1`. Identifiers that come from outside are checked here before they become part
of a key, so that no kernel id can reach into another kernel's records.
"""

from __future__ import annotations

import hashlib
import re

PREFIX = "/nbos/v1"

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def checked(identifier: str, what: str = "identifier") -> str:
    """Return `identifier` when it may stand in a key; raise ValueError that says what is wrong otherwise."""
    if not _SAFE.fullmatch(identifier):
        raise ValueError(
            f"{what} {identifier[:140]!r} may hold only letters, digits, '.', '_' and '-', "
            "must begin with a letter or digit, and has at most 128 characters"
        )
    return identifier


HOSTS = f"{PREFIX}/hosts/"
KERNELS = f"{PREFIX}/kernels/"
QUEUES = f"{PREFIX}/queues/"
ACCOUNTS = f"{PREFIX}/accounts/"
GC = f"{PREFIX}/gc/"
EXPECTED = f"{PREFIX}/expected/"
GC_STORE = f"{PREFIX}/gc/store"


def host(name: str) -> str:
    return HOSTS + checked(name, "host")


def grants(name: str) -> str:
    return host(name) + "/grants/"


def grant(name: str, grant_id: str) -> str:
    return grants(name) + checked(grant_id, "grant")


def kernel(kernel_id: str) -> str:
    """The prefix (with its slash) of everything one kernel has in etcd."""
    return KERNELS + checked(kernel_id, "kernel id") + "/"


def spec(kernel_id: str) -> str:
    return kernel(kernel_id) + "spec"


def epoch(kernel_id: str) -> str:
    return kernel(kernel_id) + "epoch"


def checkpoint(kernel_id: str) -> str:
    return kernel(kernel_id) + "checkpoint"


def replicas(kernel_id: str) -> str:
    return kernel(kernel_id) + "replicas/"


def replica(kernel_id: str, index: int) -> str:
    return replicas(kernel_id) + str(index)


def claims(kernel_id: str) -> str:
    return kernel(kernel_id) + "claims/"


def claim(kernel_id: str, n: int) -> str:
    return claims(kernel_id) + number(n)


def log(kernel_id: str) -> str:
    return kernel(kernel_id) + "log/"


def log_entry(kernel_id: str, n: int) -> str:
    return log(kernel_id) + number(n)


def queue(host_name: str) -> str:
    return QUEUES + checked(host_name, "host") + "/"


def ticket(host_name: str, ticket_id: str) -> str:
    return queue(host_name) + checked(ticket_id, "ticket")


def accounts(host_name: str) -> str:
    """The prefix of what was used on one host."""
    return ACCOUNTS + checked(host_name, "host") + "/"


def account_hour(host_name: str, hour: int) -> str:
    """Before all accounts of that hour (Unix hours) and the later ones."""
    return accounts(host_name) + number(hour)


def account(host_name: str, hour: int, journal: str) -> str:
    """journal: tells a host's journal from the one it had before it was set up anew, which would be written over."""
    return account_hour(host_name, hour) + "/" + checked(journal, "journal")


def expected(owner: str) -> str:
    """Owners' names are JupyterHub's, and may hold what a key may not."""
    return EXPECTED + hashlib.sha256(owner.encode()).hexdigest()[:32]


def gc_fence(folder: str) -> str:
    """Counts, by its revision, the collections of blobs in one owner's namespace."""
    return GC + checked(folder, "namespace") + "/fence"


def gc_lock(folder: str) -> str:
    """There, under its lease, while somebody collects in that namespace."""
    return GC + checked(folder, "namespace") + "/lock"


def number(n: int) -> str:
    """An execution number, zero-padded so that the order of keys is the order of executions."""
    if n < 0 or n >= 10**12:
        raise ValueError(f"execution number {n} is outside 0 … 10^12")
    return f"{n:012d}"
