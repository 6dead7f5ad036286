"""What a failed call to etcd means: away (worth repeating elsewhere), refused, or overtaken by a change of users."""

from __future__ import annotations

from typing import Any

import grpc

from .errors import EtcdError, LeaseGone, refused

_AWAY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
}
# A member without its quorum passes on its own deadline, and gRPC a stream that broke, as UNKNOWN.
_AWAY_DETAILS = ("context deadline exceeded", "context canceled", "Stream removed")
# Users or roles were changed between etcd's looking at a request and carrying it out: it was not carried out.
_AUTH_MOVED = ("revision of auth store is old", "revision in header is old")


def is_away(err: Any) -> bool:
    unknown = err.code() is grpc.StatusCode.UNKNOWN
    return err.code() in _AWAY or (unknown and any(text in (err.details() or "") for text in _AWAY_DETAILS))


def auth_moved(err: Any) -> bool:
    return any(text in (err.details() or "") for text in _AUTH_MOVED)


def refusal(err: Any) -> EtcdError:
    details = err.details() or ""
    if err.code() is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return LeaseGone(details)
    return EtcdError(f"{refused(details)} ({err.code().name})")


def reason(err: Any) -> str:
    details = (err.details() or "").replace("; last error: UNKNOWN", "")
    return details or err.code().name
