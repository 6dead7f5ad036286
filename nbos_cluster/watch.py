"""Watching a prefix of etcd for ever: resumed after etcd was away, read anew after compaction.

Guarantees: the events of one revision come together; none is skipped or told twice as long as the revisions
since the last one still exist; when they do not (compaction, or an etcd that lost its data), a Snapshot says
what stands now.

A broken stream is opened again from the last event's revision + 1. The revision in a response's header must
not be used for that: while a watch catches up, etcd sends it ahead of the events.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
from aetcd import rpc

from .errors import EtcdError, EtcdUnavailable, refused
from .kv import Changes, Snapshot
from .protobuf import event_of, watch_request

if TYPE_CHECKING:
    from .etcd import Etcd

log = logging.getLogger(__name__)

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.5
_PAUSE_REFUSED = 2.0
_REQUIRE_LEADER = (("hasleader", "true"),)
"""A member cut off from its quorum ends the watch instead of staying silent."""


class _Compacted(Exception):
    """The revisions to resume from are gone; read everything again."""


async def watch(etcd: Etcd, prefix: str, start_revision: int | None) -> AsyncIterator[Snapshot | Changes]:
    """See `Etcd.watch`."""
    resume, pause = start_revision, _FIRST_PAUSE
    while True:
        try:
            if resume is None:
                kvs, revision = await etcd.range(prefix)
                yield Snapshot(kvs, revision)
                resume = revision + 1
            async for changes in _stream(etcd, prefix, resume):
                pause = _FIRST_PAUSE
                if changes.events:
                    yield changes
                    resume = changes.revision + 1
        except _Compacted:
            log.info("watch of %s: revision %s is compacted, reading anew", prefix, resume)
            resume = None
            continue
        except EtcdUnavailable as err:
            if etcd.closed:
                raise
            log.info("watch of %s: %s", prefix, err)
        except EtcdError as err:
            # Not allowed, for example: an admin can put that right while we run, and a watch never ends by itself.
            log.error("etcd refuses the watch of %s, it is asked for again: %s", prefix, err)
            pause = _PAUSE_REFUSED
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


async def _stream(etcd: Etcd, prefix: str, start: int) -> AsyncIterator[Changes]:
    """The responses of one stream; the first, without events, says that it is open."""
    member = etcd.member
    call: Any = None
    try:
        call = member.watchstub.Watch(metadata=_REQUIRE_LEADER)
        await call.write(watch_request(prefix, start))
        while (response := await call.read()) is not grpc.aio.EOF:
            _check(response, start)
            etcd.seen()
            yield _changes(response)
        raise etcd.unavailable("it ended the watch")
    except rpc.AioRpcError as err:
        etcd.failed(member, err)
        raise etcd.unavailable(err.details() or err.code().name) from err
    except (asyncio.CancelledError, grpc.aio.UsageError, asyncio.InvalidStateError) as err:
        etcd.check_open(err)
    finally:
        if call is not None:
            call.cancel()


def _check(response: Any, start: int) -> None:
    if response.compact_revision or (response.created and response.header.revision < start - 1):
        # The second: an etcd whose data is older than what we saw; it would stay silent until `start`.
        raise _Compacted
    if response.canceled:
        if "permission denied" in response.cancel_reason:
            raise EtcdError(refused(response.cancel_reason))
        raise EtcdUnavailable("the watched member", 0.0, response.cancel_reason or "it cancelled the watch")


def _changes(response: Any) -> Changes:
    events = [event_of(event) for event in response.events]
    return Changes(events, events[-1].kv.mod_revision if events else response.header.revision)
