"""The asyncio client for etcd: keys, transactions, leases and watches over one or several endpoints, with
TLS.

Guarantees: no call waits longer than `timeout`; when etcd (or its quorum) is away a call raises
EtcdUnavailable, which names the endpoints and since when. With several endpoints a call moves to the next one
by itself. A call whose answer was lost is repeated, so it may be carried out twice: all our transactions
recognise what their first try has done. Watches resume by themselves (`nbos_cluster.watch`).

aetcd 1.0.0 knows one host and no TLS; both live in its `Client.connect`, which `Member` overrides. Its
watcher is not used: it delivers an error when the server goes away and stays silent afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aetcd
import grpc
from aetcd import rpc

from .errors import EtcdError, EtcdUnavailable, LeaseGone
from .grpcerrors import auth_moved, is_away, reason, refusal
from .kv import (
    KV,
    Changes,
    Compare,
    Event,
    Op,
    Snapshot,
    Txn,
    TxnResult,
    exists,
    lease_is,
    missing,
    mod_is,
    op_delete,
    op_delete_prefix,
    op_delete_range,
    op_get,
    op_newest,
    op_put,
    prefix_end,
    value_is,
)
from .lease import Lease
from .protobuf import key_value, kvs_of, txn_request, txn_result
from .watch import watch

__all__ = [
    "KV",
    "Changes",
    "Compare",
    "Etcd",
    "EtcdError",
    "EtcdUnavailable",
    "Event",
    "Lease",
    "LeaseGone",
    "Op",
    "Snapshot",
    "TLSFiles",
    "Txn",
    "TxnResult",
    "exists",
    "lease_is",
    "missing",
    "mod_is",
    "op_delete",
    "op_delete_prefix",
    "op_delete_range",
    "op_get",
    "op_newest",
    "op_put",
    "value_is",
]

_OPTIONS: dict[str, int] = {
    # A new connection at once when etcd is back: gRPC would wait up to two minutes.
    "grpc.initial_reconnect_backoff_ms": 50,
    "grpc.max_reconnect_backoff_ms": 500,
    # How long one attempt (with its TLS handshake) may take.
    "grpc.min_reconnect_backoff_ms": 2000,
    # Finds a peer that vanished without a word under a watch. etcd throws out who pings more often than every
    # 5 s, or at all without a call under way; then the next call's own deadline finds a dead peer.
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 3000,
    "grpc.keepalive_permit_without_calls": 0,
    "grpc.http2.max_pings_without_data": 0,
    # A snapshot of many kernels passes gRPC's 4 MB.
    "grpc.max_receive_message_length": -1,
    # etcd is ours: never through a user's http_proxy, never over another client's connection.
    "grpc.enable_http_proxy": 0,
    "grpc.use_local_subchannel_pool": 1,
}

_PAUSE = 0.05


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """PEM files: the CA that signed etcd's certificate, and our own certificate with its key."""

    ca: Path
    cert: Path
    key: Path

    def credentials(self) -> Any:
        return grpc.ssl_channel_credentials(
            root_certificates=Path(self.ca).read_bytes(),
            private_key=Path(self.key).read_bytes(),
            certificate_chain=Path(self.cert).read_bytes(),
        )


class Member(aetcd.Client):
    """aetcd's client of one etcd member, given TLS and our connection options."""

    def __init__(self, endpoint: str, tls: TLSFiles | None) -> None:
        super().__init__(options=_OPTIONS)
        self.endpoint = endpoint
        self.watchstub: Any = None
        self.channel: Any = None
        self._tls = tls

    async def connect(self) -> None:
        """Open the channel. gRPC connects when the first call needs it, so this never waits."""
        if self.channel is not None:
            return
        options = list(_OPTIONS.items())
        if self._tls is None:
            self.channel = rpc.insecure_channel(self.endpoint, options=options)
        else:
            self.channel = rpc.secure_channel(self.endpoint, self._tls.credentials(), options=options)
        self.kvstub = rpc.KVStub(self.channel)
        self.leasestub = rpc.LeaseStub(self.channel)
        self.maintenancestub = rpc.MaintenanceStub(self.channel)
        self.watchstub = rpc.WatchStub(self.channel)
        self._connected.set()


class Etcd:
    """A client of one etcd cluster. `endpoints`: "address:port" each. `timeout`: seconds for one call, all
    tries together. All methods raise EtcdUnavailable when etcd is away, EtcdError when it refuses."""

    def __init__(self, endpoints: Sequence[str], tls: TLSFiles | None = None, timeout: float = 3.0) -> None:
        if isinstance(endpoints, str) or not endpoints:
            raise ValueError("endpoints: a list of at least one 'address:port'")
        self.endpoints = tuple(endpoints)
        self.timeout = timeout
        self._members = [Member(endpoint, tls) for endpoint in self.endpoints]
        self._current = 0
        self._away_since: float | None = None
        self._closed = False

    async def connect(self) -> None:
        """Open the channels. Does not ask whether etcd is there; the first call does."""
        for member in self._members:
            await member.connect()

    async def close(self) -> None:
        """End the connections; calls and watches under way raise EtcdUnavailable."""
        self._closed = True
        for member in self._members:
            await member.close()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def away_since(self) -> float | None:
        """Unix seconds since when etcd has not answered; None while it does."""
        return self._away_since

    async def get(self, key: str) -> KV | None:
        answer = await self.call(_range, rpc.RangeRequest(key=key.encode()))
        return key_value(answer.kvs[0]) if answer.kvs else None

    async def range(self, prefix: str) -> tuple[list[KV], int]:
        """Every key under `prefix`, in order, and the revision at which they stood so."""
        request = rpc.RangeRequest(key=prefix.encode(), range_end=prefix_end(prefix).encode())
        answer = await self.call(_range, request)
        return kvs_of(answer), answer.header.revision

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write one key; returns the revision. LeaseGone when the lease has ended."""
        answer = await self.call(_put, rpc.PutRequest(key=key.encode(), value=value, lease=lease))
        return int(answer.header.revision)

    async def delete(self, key: str) -> bool:
        """Delete one key; whether it was there (False also when a repeated call found its own work done)."""
        answer = await self.call(_delete, rpc.DeleteRangeRequest(key=key.encode()))
        return bool(answer.deleted)

    async def delete_prefix(self, prefix: str) -> int:
        request = rpc.DeleteRangeRequest(key=prefix.encode(), range_end=prefix_end(prefix).encode())
        return int((await self.call(_delete, request)).deleted)

    async def txn(self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        return txn_result(await self.call(_txn, txn_request(compare, success, failure)))

    async def commit(self, txn: Txn) -> TxnResult:
        """Carry out a transaction that election, membership or statelog made."""
        return await self.txn(txn.compare, txn.success, txn.failure)

    async def lease_grant(self, ttl: float) -> int:
        """A new lease of `ttl` seconds (etcd counts whole ones, and gives at least its election's time)."""
        answer = await self.call(_grant, rpc.LeaseGrantRequest(TTL=max(1, round(ttl))))
        return int(answer.ID)

    async def lease_revoke(self, lease: int) -> None:
        """End the lease and everything it keeps; nothing happens when it has ended."""
        try:
            await self.call(_revoke, rpc.LeaseRevokeRequest(ID=lease))
        except LeaseGone:
            return

    async def lease_alive(self, lease: int) -> float:
        """Seconds the lease has left; 0 or less when it has ended. Does not prolong it."""
        return float((await self.call(_ttl, rpc.LeaseTimeToLiveRequest(ID=lease))).TTL)

    async def lease_refresh(self, lease: int) -> float:
        """Give the lease its whole time again; returns it (seconds). LeaseGone when it has ended."""
        ttl = float((await self.call(_keep_alive, rpc.LeaseKeepAliveRequest(ID=lease))).TTL)
        if ttl <= 0:
            raise LeaseGone(f"lease {lease:x} has ended")
        return ttl

    def watch(self, prefix: str, start_revision: int | None = None) -> AsyncIterator[Snapshot | Changes]:
        """What stands under `prefix` (a Snapshot first, unless `start_revision` is given), then every change
        of it.

        Never ends by itself and outlives etcd being away; after compaction a new Snapshot comes. Cancel the
        task, or `aclose()` the iterator, to end it.
        """
        return watch(self, prefix, start_revision)

    async def compact(self, revision: int) -> None:
        """Forget what was before `revision`; nothing happens when that is done already."""
        try:
            await self.call(_compact, rpc.CompactionRequest(revision=revision, physical=True))
        except EtcdError as err:
            if "has been compacted" not in str(err):
                raise

    async def defragment(self) -> None:
        """Give space that compaction freed back to the file system, on the member in use (it stops meanwhile)."""
        await self.call(_defragment, rpc.DefragmentRequest())

    async def status(self) -> dict[str, Any]:
        """Of the member in use: endpoint, version, db_size and db_in_use (bytes), leader, revision."""
        answer = await self.call(_status, rpc.StatusRequest())
        return {
            "endpoint": self.member.endpoint,
            "version": answer.version,
            "db_size": int(answer.dbSize),
            "db_in_use": int(getattr(answer, "dbSizeInUse", 0)),
            "leader": int(answer.leader),
            "revision": int(answer.header.revision),
        }

    @property
    def member(self) -> Member:
        """The member that calls go to now."""
        return self._members[self._current]

    async def call(self, send: Callable[[Member, Any, float], Awaitable[Any]], request: Any) -> Any:
        """Carry out one request on the current member, moving on and repeating until `timeout` is over."""
        deadline = time.monotonic() + self.timeout
        share = max(0.5, self.timeout / len(self._members))
        while True:
            member = self.member
            left = deadline - time.monotonic()
            try:
                answer = await send(member, request, min(left, share) if len(self._members) > 1 else left)
            except rpc.AioRpcError as err:
                self.failed(member, err)
                if deadline - time.monotonic() <= _PAUSE:
                    raise self.unavailable(reason(err)) from err
            except (asyncio.CancelledError, grpc.aio.UsageError, AttributeError) as err:
                self.check_open(err)
            else:
                self._away_since = None
                return answer
            await asyncio.sleep(_PAUSE)

    def failed(self, member: Member, err: Any) -> None:
        """Note that `member` did not answer, and use the next one. Raises EtcdError for a refusal."""
        if auth_moved(err):
            return
        if not is_away(err):
            raise refusal(err) from err
        if self._away_since is None:
            self._away_since = time.time()
        if member is self.member:
            self._current = (self._current + 1) % len(self._members)

    def seen(self) -> None:
        """etcd gave a sign of life."""
        self._away_since = None

    def unavailable(self, why: str) -> EtcdUnavailable:
        since = self._away_since if self._away_since is not None else time.time()
        return EtcdUnavailable(", ".join(self.endpoints), since, why)

    def check_open(self, err: BaseException) -> None:
        """Tell a client that was closed under a call from the cancellation of our own task."""
        if self._closed:
            task = asyncio.current_task()
            if not (isinstance(err, asyncio.CancelledError) and task is not None and task.cancelling()):
                raise self.unavailable("this client was closed") from err
        raise err


async def _range(member: Member, request: Any, timeout: float) -> Any:
    return await member.kvstub.Range(request, timeout=timeout)


async def _put(member: Member, request: Any, timeout: float) -> Any:
    return await member.kvstub.Put(request, timeout=timeout)


async def _delete(member: Member, request: Any, timeout: float) -> Any:
    return await member.kvstub.DeleteRange(request, timeout=timeout)


async def _txn(member: Member, request: Any, timeout: float) -> Any:
    return await member.kvstub.Txn(request, timeout=timeout)


async def _compact(member: Member, request: Any, timeout: float) -> Any:
    return await member.kvstub.Compact(request, timeout=timeout)


async def _grant(member: Member, request: Any, timeout: float) -> Any:
    return await member.leasestub.LeaseGrant(request, timeout=timeout)


async def _revoke(member: Member, request: Any, timeout: float) -> Any:
    return await member.leasestub.LeaseRevoke(request, timeout=timeout)


async def _ttl(member: Member, request: Any, timeout: float) -> Any:
    return await member.leasestub.LeaseTimeToLive(request, timeout=timeout)


async def _keep_alive(member: Member, request: Any, timeout: float) -> Any:
    # The call is a stream; one round of it is enough every few seconds and leaves nothing open.
    stream = member.leasestub.LeaseKeepAlive(timeout=timeout)
    await stream.write(request)
    try:
        return await stream.read()
    finally:
        stream.cancel()


async def _status(member: Member, request: Any, timeout: float) -> Any:
    return await member.maintenancestub.Status(request, timeout=timeout)


async def _defragment(member: Member, request: Any, timeout: float) -> Any:
    return await member.maintenancestub.Defragment(request, timeout=timeout)
