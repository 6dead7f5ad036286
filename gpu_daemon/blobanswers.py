"""The daemon's answers about blobs (docs/protocol.md, 1): one method a request, as in `answers`.

The bytes go through threads, since these are the only answers that wait for a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from gpu_daemon import requests
from gpu_daemon.blobs import BlobError
from gpu_daemon.replica import LocalReplica
from gpu_daemon.requests import RequestError
from gpu_daemon.site import Refused, Site, log
from nbos_cluster import files
from nbos_cluster.arena import Arena
from nbos_cluster.wire import Message

if TYPE_CHECKING:
    from gpu_daemon.sessions import Reply, Session

MAX_HASHES = 4096


class BlobAnswers:
    def __init__(self, site: Site) -> None:
        self._site = site
        self.by_type: dict[str, Callable[[Session, Message, bytes], Awaitable[Reply]]] = {
            "put_blob": self._put_blob,
            "get_blob": self._get_blob,
            "have_blobs": self._have_blobs,
            "room": self._room,
            "arena": self._arena,
            "files": self._files,
        }

    async def _arena(self, session: Session, message: Message, payload: bytes) -> Reply:
        """The whole conversation of a connection of its own: no reply besides the frame with the descriptor."""
        check_peer(session)
        replica = session.replica
        replica.drop_arena()
        replica.arena = Arena.make()
        session.hand_over(replica.arena)
        return {}, b""

    async def _files(self, session: Session, message: Message, payload: bytes) -> Reply:
        """Blobs for the replica to read itself, on a connection of its own like the arena."""
        check_peer(session)
        hashes = requests.texts(message, "hashes", most=files.AT_ONCE)
        if not self.hands_out_files(session):
            raise Refused("refused", "this daemon hands out no files")
        with _blob_errors():
            handles = await self._site.blobs.open_files(self._owner(session.replica), hashes)
        try:
            session.hand_over_files(handles)
        finally:
            files.close(handles)
        return {}, b""

    def hands_out_files(self, session: Session) -> bool:
        return self._site.blobs.store.hands_out_files and session.may_hold_files

    async def _put_blob(self, session: Session, message: Message, payload: bytes) -> Reply:
        data: bytes | memoryview = payload
        if "at" in message:
            data = self._place(session, message, "size")
        wanted = requests.text(message, "hash") if "hash" in message else None
        with _blob_errors():
            return {"hash": await self._site.blobs.put(self._owner(session.replica), wanted, data)}, b""

    async def _get_blob(self, session: Session, message: Message, payload: bytes) -> Reply:
        owner, digest = self._owner(session.replica), requests.text(message, "hash")
        with _blob_errors():
            if "at" in message:
                place = self._place(session, message, "room")
                return {"size": await self._site.blobs.read_into(owner, digest, place)}, b""
            data = await self._site.blobs.get(owner, digest)
            return {"size": len(data)}, data

    async def _have_blobs(self, session: Session, message: Message, payload: bytes) -> Reply:
        hashes = requests.texts(message, "hashes", most=MAX_HASHES)
        with _blob_errors():
            blobs = self._site.blobs
            there, free = await asyncio.gather(blobs.have(self._owner(session.replica), hashes), blobs.free())
        return {"have": sorted(there), "free": free, "where": blobs.store.where}, b""

    async def _room(self, session: Session, message: Message, payload: bytes) -> Reply:
        """What is left in the store, and of memory on the hosts of the other replicas, as their daemons told last."""
        blobs, view = self._site.blobs, self._site.known(session.replica.id.kernel)
        with _blob_errors():
            free = await blobs.free()
        others = {i: record for i, record in sorted(view.replicas.items()) if i != session.replica.id.index}
        standbys = [{"replica": i, "host": r.host, "free": r.memory or None} for i, r in others.items()]
        return {"store": {"where": blobs.store.where, "free": free}, "standbys": standbys}, b""

    def _place(self, session: Session, message: Message, size: str) -> memoryview:
        """The part of the arena that a request names."""
        arena = session.replica.arena
        if arena is None:
            raise Refused(
                "no_arena", "this daemon shares no memory with the replica (it was restarted); ask for it anew"
            )
        try:
            return arena.part(requests.number(message, "at"), requests.number(message, size))
        except ValueError as err:
            raise RequestError(str(err)) from err

    def _owner(self, replica: LocalReplica) -> str:
        """From the kernel's record, never from the message: a replica reaches its own owner's blobs only."""
        spec = self._site.known(replica.id.kernel).spec
        assert spec is not None
        return spec.owner


def check_peer(session: Session) -> None:
    replica = session.replica
    if replica.handle is None or not replica.handle.owns(session.peer_pid):
        raise Refused(
            "refused", f"process {session.peer_pid} is not {replica.name}; only the replica may use its socket"
        )


@contextlib.contextmanager
def _blob_errors() -> Iterator[None]:
    try:
        yield
    except BlobError as err:
        log.warning("%s", err)
        raise Refused(err.code, str(err)) from err
