"""The sockets of the replicas: one each, which is the replica's identity. Frames in, requests out; pushes back.

Guarantees: nothing that comes through a socket ends the daemon or reaches another replica; a frame that cannot be read
is answered with `error` and the connection closed; appends of one replica are carried out in order, and a bid after the
appends before it. A replica that does not read is not buffered for: entries wait until it does, and a connection whose
buffer grows nevertheless is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from gpu_daemon.replica import LocalReplica
from gpu_daemon.requests import RequestError
from gpu_daemon.site import RECOVERY, Refused, Site, log, plain
from nbos_cluster import arena as arena_module
from nbos_cluster import files, wire
from nbos_cluster.arena import Arena
from nbos_cluster.kernelview import KernelView
from nbos_cluster.statewire import entry_to_wire, state_to_wire
from nbos_cluster.wire import Message, WireError

BUFFER_LIMIT = 32 * 1024 * 1024
AT_ONCE = 8
"""Requests of one replica that are carried out at the same time; more wait in the socket."""
BLOBS_AT_ONCE = 256
"""As many that move blobs through the arena: they hold none of our memory, and the store may be slow."""
HELLO_WITHIN = 30.0

TOLD = frozenset({"applied", "release", "sliced"})
"""Requests whose answer nobody waits for. It travels with the next message, so that a running cell is not disturbed:
each message of ours wakes a thread of the replica, and costs this side a tenth of a millisecond."""
TOLD_WITHIN = 0.2
"""Seconds after which such answers go out by themselves."""

Reply = tuple[Message, bytes]
Answer = Callable[["Session", Message, bytes], Awaitable[Reply]]


class Session:
    """One connection of a replica. `answer` carries out its requests."""

    def __init__(
        self,
        site: Site,
        replica: LocalReplica,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer: Answer,
    ) -> None:
        self._site, self.replica, self._answer = site, replica, answer
        self._reader, self._writer = reader, writer
        self._tasks: set[asyncio.Task[None]] = set()
        self._follower: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._free = asyncio.Semaphore(AT_ONCE)
        self._large = asyncio.Lock()
        self._free_for_blobs = asyncio.Semaphore(BLOBS_AT_ONCE)
        self._last_append: asyncio.Task[None] | None = None
        self._members: Message | None = None
        self._members_new = True
        self._held_back: list[bytes | memoryview] = []
        self._flusher: asyncio.TimerHandle | None = None
        self.used: set[int] = set()
        """The executions that the replica asked about in this connection."""

    @property
    def peer_pid(self) -> int:
        """The process at the other end, as the kernel of the operating system says."""
        return self._peer()[0]

    def _peer(self) -> tuple[int, int, int]:
        sock = self._writer.get_extra_info("socket")
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid, gid

    def hand_over(self, arena: Arena) -> None:
        """Answer this connection's first message, `arena`, with its descriptor. Nothing was written before it."""
        with self._apart() as own:
            arena_module.hand_over(own, arena)

    def hand_over_files(self, handles: Sequence[int | None]) -> None:
        """The same for `files`."""
        with self._apart() as own:
            files.hand_over(own, handles)

    def _apart(self) -> socket.socket:
        own = socket.socket(fileno=os.dup(self._writer.get_extra_info("socket").fileno()))
        own.setblocking(False)
        return own

    @property
    def may_hold_files(self) -> bool:
        """Whether a descriptor for reading lets its process do no more than it could before, and read."""
        handle = self.replica.handle
        return handle is not None and reads_only(handle.container, self._peer()[1], os.geteuid())

    # -- out ----------------------------------------------------------------------------------------------------------

    def push(self, message: Message, payload: bytes = b"") -> None:
        """Send a message without waiting for the replica to read it."""
        self._held_back += wire.pack(message, payload)
        self._flush()

    def _push_later(self, message: Message) -> None:
        """With the next message, or by itself soon."""
        self._held_back += wire.pack(message)
        if self._flusher is None:
            self._flusher = asyncio.get_running_loop().call_later(TOLD_WITHIN, self._flush)

    def _flush(self) -> None:
        if self._flusher is not None:
            self._flusher.cancel()
            self._flusher = None
        buffers, self._held_back = self._held_back, []
        if self._writer.is_closing() or not buffers:
            return
        self._writer.writelines(buffers)
        if self._writer.transport.get_write_buffer_size() > BUFFER_LIMIT:
            log.warning("%s does not read what it is sent; its connection is closed", self.replica.name)
            self._writer.transport.abort()

    def follow(self, applied: int) -> None:
        """From now on push the log after `applied`, and the members. Called once, after the reply to `hello`."""
        if self._follower is None:
            self._news.set()
            self._follower = self._site.spawn(self._follow(applied), f"entries for {self.replica.name}")

    def news(self, members: bool) -> None:
        """The kernel's log changed; members: its members, too."""
        self._members_new = self._members_new or members
        self._news.set()

    async def _follow(self, sent: int) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await self._news.wait()
                self._news.clear()
                view = self._site.view(self.replica.id.kernel)
                if view is None or view.spec is None or view.spec.incarnation != self.replica.incarnation:
                    continue
                if self._members_new:
                    self._members_new = False
                    self._push_members(view)
                sent = await self._push_log(view, max(sent, self.replica.applied))

    async def _push_log(self, view: KernelView, sent: int) -> int:
        try:
            state, entries = view.catch_up(sent)
        except LookupError:
            # A fold whose other half is on its way: the next change brings it.
            return sent
        if state is not None:
            message, payload = state_to_wire(state)
            self.push({"type": "state", **message}, payload)
            sent = state.upto
        for entry in entries:
            if not self._wrote(entry.n, entry.token):
                message, payload = entry_to_wire(entry)
                self.push({"type": "entry", **message}, payload)
                await self._writer.drain()
            sent = entry.n
        return sent

    def _wrote(self, n: int, token: int) -> bool:
        """Whether this process is the author of the entry (its append may not be answered yet)."""
        held = self.replica.held
        return n <= self.replica.applied or (held is not None and held.n == n and held.knows(token))

    def members(self, view: KernelView) -> Message:
        """Who is there; as they were, where etcd stood still just now and records ended with everybody's lease: whoever
        lives writes them again in a moment."""
        members = members_message(view)
        if self._members is not None and self._site.cut_off and lost_of(members) - lost_of(self._members):
            return self._members
        return members

    def _push_members(self, view: KernelView) -> None:
        members = members_message(view)
        if self._site.cut_off and lost_of(members) - lost_of(self._members):
            asyncio.get_running_loop().call_later(RECOVERY, self.news, True)
            return
        if members != self._members:
            self._members = members
            self.push({"type": "members", **members})

    # -- in -----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the replica goes or breaks the protocol."""
        try:
            async with asyncio.timeout(HELLO_WITHIN):
                message, payload = await wire.read(self._reader)
            await self._carry_out(message, payload)
            while self.replica.session is self:
                message, payload = await wire.read(self._reader)
                await self._start(message, payload)
        except WireError as err:
            log.warning("%s: %s", self.replica.name, err)
            self.push({"type": "error", "error": "malformed", "reason": str(err)})
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            log.debug("%s closed its connection", self.replica.name)
        finally:
            await self._close()

    async def _start(self, message: Message, payload: bytes) -> None:
        kind = message.get("type")
        free = self._free_for_blobs if kind in ("put_blob", "get_blob") and "at" in message else self._free
        await free.acquire()
        before = self._last_append
        if kind in TOLD:
            # Carried out at once: they wait for nothing, and a task of their own costs more than they do.
            await self._carry_out(message, payload)
            free.release()
            return
        if kind not in ("append", "bid"):
            before = None
        task = asyncio.create_task(self._carry_out_after(before, message, payload))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._done(done, free))
        if kind == "append":
            self._last_append = task

    def _done(self, task: asyncio.Task[None], free: asyncio.Semaphore) -> None:
        self._tasks.discard(task)
        free.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request of %s failed", self.replica.name, exc_info=error)

    async def _carry_out_after(self, before: asyncio.Task[None] | None, message: Message, payload: bytes) -> None:
        if before is not None and not before.done():
            await asyncio.wait({before})
        await self._carry_out(message, payload)

    async def _carry_out(self, message: Message, payload: bytes) -> None:
        reply, data = await self._reply(message, payload)
        answerable = isinstance(message.get("id"), int | str)
        if answerable and message.get("type") in TOLD:
            self._push_later({"re": message["id"], **reply})
        elif answerable:
            # Large answers one by one: together they would pass what is buffered for a slow reader.
            async with self._large if data else contextlib.nullcontext():
                self.push({"re": message["id"], **reply}, data)
                with contextlib.suppress(ConnectionError):
                    await self._writer.drain()
        if message.get("type") == "hello" and reply["ok"]:
            self.follow(self.replica.applied)

    async def _reply(self, message: Message, payload: bytes) -> Reply:
        if self.replica.session is not self and message.get("type") not in ("hello", "arena", "files"):
            return refusal("malformed", "the first message of a connection is hello")
        try:
            reply, data = await self._answer(self, message, payload)
        except RequestError as err:
            self._site.meters.refused(err.code)
            return refusal(err.code, str(err))
        except Refused as err:
            self._site.meters.refused(err.code)
            reply, data = refusal(err.code, str(err))
            return {**err.fields, **reply}, data
        except Exception as err:  # noqa: BLE001
            # A mistake of ours: told and logged, so that the replica does not wait for ever.
            self._site.meters.refused("failed")
            log.exception("a request %r of %s failed", message.get("type"), self.replica.name)
            return refusal("failed", f"the daemon could not carry out {message.get('type')!r}: {err}")
        return {"ok": True, **reply}, data

    async def _close(self) -> None:
        if self.replica.session is self:
            self.replica.session = None
        for task in (self._follower, *self._tasks):
            if task is not None:
                task.cancel()
        self._flush()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    def close(self) -> None:
        """End the connection from this side; `run` returns."""
        self._writer.transport.abort()


def reads_only(container: str, uid: int, ours: int) -> bool:
    """Whether a process can do nothing new to a file of ours when it is given a descriptor for reading. Its owner, and
    root, could open it again for writing (/proc/self/fd); a replica without a container is our user anyway."""
    return not container or uid not in (0, ours)


def refusal(code: str, reason: str) -> Reply:
    return {"ok": False, "error": code, "reason": reason}, b""


def members_message(view: KernelView) -> Message:
    """Everybody who should be there; a member without a record is `lost` (its host is gone, or has not started it)."""
    assert view.spec is not None
    members = []
    for index in sorted(int(i) for i in view.spec.placement):
        record = view.replicas.get(index)
        host = view.spec.placement[str(index)]
        if record is None:
            fields = {"index": index, "host": host, "state": "lost", "ip": "", "ports": None, "applied": -1, "pid": 0}
        else:
            names = ("index", "host", "state", "ip", "ports", "applied", "pid")
            fields = {name: plain(getattr(record, name)) for name in names}
            if record.lacks:
                fields["lacks"] = list(record.lacks)
        members.append(fields)
    epoch = view.epoch.epoch if view.epoch is not None else 0
    return {"epoch": epoch, "revision": view.members_rev, "members": members}


def lost_of(members: Message | None) -> set[int]:
    return {m["index"] for m in members["members"] if m["state"] == "lost"} if members is not None else set()


Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def listen(path: Path, connected: Connected, mode: int = 0o600) -> asyncio.Server:
    """A server on a new socket at `path`, which has this mode from the start."""
    sock = _bind(path, mode)
    try:
        return await asyncio.start_unix_server(connected, sock=sock, limit=1 << 20)
    except BaseException:
        sock.close()
        raise


def _bind(path: Path, mode: int) -> socket.socket:
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(str(path))
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock
