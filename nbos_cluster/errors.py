"""What can go wrong with etcd, as the rest of NBOS sees it: away, refused, or the lease is gone."""

from __future__ import annotations

import time


class EtcdError(Exception):
    """etcd refused a request; the message is its own."""


def refused(details: str) -> str:
    """etcd's own words, with the way out where there is one."""
    if "permission denied" in details or "user not found" in details:
        return f"{details}: the user that this process's certificate names may not do that; see `nbos etcd-setup`"
    return details


class LeaseGone(EtcdError):
    """The lease has ended (or never was); everything it kept is deleted."""


class EtcdUnavailable(ConnectionError):
    """etcd, or its quorum, does not answer. `since`: Unix seconds of the last sign of life, or of the first
    try."""

    def __init__(self, endpoints: str, since: float, why: str) -> None:
        self.endpoints = endpoints
        self.since = since
        self.why = why
        clock = time.strftime("%H:%M:%S", time.localtime(since))
        away = max(0.0, time.time() - since)
        super().__init__(f"etcd at {endpoints} does not answer since {clock} ({away:.0f} s): {why}")
