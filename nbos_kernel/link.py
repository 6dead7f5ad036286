"""The replica's one connection to its daemon: requests with exactly one reply each, and what the daemon pushes.

Guarantees: a request made while the daemon is away, or not answered when it went, is sent again after `hello` on
the next connection, in the order of the first sending; every future ends. Reconnecting never gives up (50 ms to
1 s).

Threads: a reader thread of its own ("NBOS link") with a plain blocking socket reads everything, so that membership,
a renewed token and the control channel's questions get through while a cell blocks the main loop. Any thread may
write: it does so itself, under a lock, so that a bid costs one system call and one wake-up each way and passes no
event loop of ours (measured: 0.18 ms from bid to answer, a daemon in memory included).
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from nbos_cluster import wire

Payload = bytes | bytearray | memoryview
Reply = tuple[wire.Message, bytes]

SEND_TIMEOUT = 30.0
"""Seconds a write may wait for a daemon that does not read, before the connection is given up."""


class DaemonAway(ConnectionError):
    """The host's daemon does not answer; says since when. The link goes on trying."""


@dataclass
class Request:
    """A question to the daemon that is not answered yet."""

    message: wire.Message
    payload: Payload
    future: Future[Reply] = field(default_factory=Future)


class Link:
    """`path`: the daemon's socket. `hello()` gives the fields of the first message of each connection, `greeted`
    gets its reply, `pushed` gets what comes without being asked for; both are called on the link's thread."""

    def __init__(
        self,
        path: str,
        hello: Callable[[], wire.Message],
        greeted: Callable[[wire.Message], None],
        pushed: Callable[[wire.Message, bytes], None],
        log: logging.Logger,
    ) -> None:
        self._path, self._hello, self._greeted, self._pushed, self._log = path, hello, greeted, pushed, log
        self._ids = itertools.count(1)
        self._lock = threading.Lock()  # of the table of requests; never held while writing
        self._sending = threading.RLock()  # keeps frames whole and in the order of the requests
        self._pending: dict[int, Request] = {}
        self._sock: socket.socket | None = None
        self._ready = threading.Event()
        self._stopped = threading.Event()
        self.away_since = time.monotonic()  # this host's clock may be set meanwhile
        self._thread = threading.Thread(target=self._run, name="NBOS link", daemon=True)
        # debugpy suspends every thread at a breakpoint except those marked like this.
        self._thread.pydev_do_not_trace = True  # type: ignore[attr-defined]
        self._thread.is_pydev_daemon_thread = True  # type: ignore[attr-defined]

    @property
    def connected(self) -> bool:
        return self._ready.is_set()

    def start(self) -> None:
        # A forked child must not keep the connection open when this process is gone.
        os.register_at_fork(after_in_child=self._forked)
        self._thread.start()

    def wait_connected(self, timeout: float) -> bool:
        return self._ready.wait(timeout)

    def stop(self) -> None:
        """End the connection. What is not answered fails with DaemonAway."""
        self._stopped.set()
        self._drop()
        with self._lock:
            pending, self._pending = list(self._pending.values()), {}
        for request in pending:
            _settle(request.future, DaemonAway("the replica is ending"))

    # Asking ------------------------------------------------------------------------------------------------------

    def request(self, message: wire.Message, payload: Payload = b"") -> Request:
        """Send `message` (now, or once there is a connection); its future gets the reply and its payload."""
        with self._sending:
            request_id = next(self._ids)
            request = Request({**message, "id": request_id}, payload)
            with self._lock:
                self._pending[request_id] = request
            if self._ready.is_set():
                self._write(request)
        return request

    def tell(self, message: wire.Message) -> None:
        """A request whose answer changes nothing here; it is repeated like any other until it is answered."""
        self.request(message)

    def withdraw(self, request: Request, why: str) -> None:
        """Forget a request: it is not sent again, and its future fails with DaemonAway(why)."""
        with self._lock:
            self._pending.pop(request.message["id"], None)
        _settle(request.future, DaemonAway(why))

    def own_payloads(self) -> None:
        """Copy every payload that is still to be answered, so that the memory it was taken from may change."""
        with self._lock:
            for request in self._pending.values():
                if isinstance(request.payload, memoryview):
                    request.payload = bytes(request.payload)

    def since(self) -> str:
        return f"the daemon of this host has been away for {max(0.0, time.monotonic() - self.away_since):.1f} s"

    def _write(self, request: Request) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            for buffer in wire.pack(request.message, request.payload):
                sock.sendall(buffer)
        except wire.WireError as err:
            # Our own message is over a limit: the connection is sound, this request is not.
            with self._lock:
                self._pending.pop(request.message["id"], None)
            _settle(request.future, err)
        except OSError as err:
            self._log.warning("NBOS: the connection to the daemon broke while writing: %s", err)
            self._drop()

    # The reader thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        delay = 0.05
        while not self._stopped.is_set():
            try:
                self._connect()
                delay = 0.05
                while True:
                    self._take(*wire.receive(self._connection()))
            except (OSError, EOFError) as err:
                self._log.debug("NBOS: no connection to the daemon at %s: %s", self._path, err)
            except Exception:  # noqa: BLE001 - the thread must live: a push that cannot be handled must not cut the replica off
                self._log.exception("NBOS: a message of the daemon could not be handled")
            self._drop()
            if self._stopped.wait(delay):
                return
            delay = min(1.0, delay * 2)

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self._path)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            seconds = int(SEND_TIMEOUT).to_bytes(8, "little") + bytes(8)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
            for buffer in wire.pack({"type": "hello", "id": 0, **self._hello()}):
                sock.sendall(buffer)
            self._sock = sock
            while True:
                message, payload = wire.receive(sock)
                if message.get("re") == 0:
                    break
                self._take(message, payload)
        except BaseException:
            sock.close()
            self._sock = None
            raise
        if not message.get("ok", False):
            raise wire.WireError(f"the daemon refused hello: {message.get('error')}")
        self._greeted(message)
        with self._sending:
            with self._lock:
                unanswered = list(self._pending.values())
            self._ready.set()
            for request in unanswered:
                self._write(request)

    def _connection(self) -> socket.socket:
        if self._sock is None:
            raise EOFError("the connection was given up")
        return self._sock

    def _take(self, message: wire.Message, payload: bytes) -> None:
        if "re" not in message:
            self._pushed(message, payload)
            return
        with self._lock:
            request = self._pending.pop(message["re"], None)
        if request is not None and not request.future.done():
            request.future.set_result((message, payload))

    def _drop(self) -> None:
        with self._lock:
            if self._ready.is_set():
                self.away_since = time.monotonic()
            self._ready.clear()
            sock, self._sock = self._sock, None
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError as err:
                self._log.debug("NBOS: closing the connection to the daemon: %s", err)
            sock.close()

    def _forked(self) -> None:
        sock = self._sock
        if sock is not None:
            os.close(sock.detach())
        self._sock = None
        self._ready.clear()


def _settle(future: Future[Reply], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
