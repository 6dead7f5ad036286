"""Memory that a replica and its daemon share, so that the bytes of blobs never cross the socket. Standard library only.

The daemon makes it (`Arena.make`) and hands the replica its file descriptor over the replica's own socket (`fetch`);
from then on `put_blob` and `get_blob` name a place in it instead of carrying bytes.

Guarantees: neither side can shrink or grow it under the other (sealed); a range that `Room.take` gave is given to
nobody else until `Room.give`. What lies in it is the replica's to write at any time: the daemon trusts nothing it
read there before it has it in its own file.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import threading
import time
from bisect import insort
from collections.abc import Callable

from . import wire

SIZE = 128 * 1024 * 1024
"""Bytes of one replica's arena: what is on its way to or from the store at one time, at most. The daemon makes 32 MiB
safe at a time: there is room for what is being written, on its way to the disk, and being made safe."""

PAGE = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """`view` is the whole of it, writable."""

    def __init__(self, handle: int, size: int) -> None:
        self.handle, self.size = handle, size
        self._map = mmap.mmap(handle, size)
        self.view = memoryview(self._map)

    @classmethod
    def make(cls, size: int = SIZE) -> Arena:
        """A new one, empty: pages cost memory once they are used."""
        handle = os.memfd_create("nbos-blobs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(handle, size)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
            return cls(handle, size)
        except BaseException:
            os.close(handle)
            raise

    def part(self, at: int, size: int) -> memoryview:
        """The bytes at `at`. Raises ValueError when they are not inside."""
        if at < 0 or size < 0 or at + size > self.size:
            raise ValueError(f"{size} bytes at {at} are outside the shared memory of {self.size} bytes")
        return self.view[at : at + size]

    def forget_pages(self) -> None:
        """Give the memory back to the system; what lies in it is gone. For an arena that nobody uses now."""
        self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Give up this side's descriptor. The memory goes when the last view of it goes."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


class Room:
    """Which ranges of an arena are free. First fit; for several threads."""

    def __init__(self, size: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)]
        self._changed = threading.Condition()
        self.size = size

    def take(self, size: int, timeout: float | None = 0.0) -> int | None:
        """Where `size` bytes are now yours; None when there was no room within `timeout` seconds (None: for ever)."""
        size = _pages(size)
        if size > self.size:
            return None
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                for number, (at, length) in enumerate(self._free):
                    if length >= size:
                        self._free[number : number + 1] = [(at + size, length - size)] if length > size else []
                        return at
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)

    @property
    def idle(self) -> bool:
        """Whether nothing of it is taken."""
        return self._free == [(0, self.size)]

    def when_idle(self, work: Callable[[], None]) -> None:
        """Do `work` if nothing is taken; nothing is given out meanwhile."""
        with self._changed:
            if self.idle:
                work()

    def give(self, at: int, size: int) -> None:
        with self._changed:
            insort(self._free, (at, _pages(size)))
            merged: list[tuple[int, int]] = []
            for start, length in self._free:
                if merged and merged[-1][0] + merged[-1][1] == start:
                    merged[-1] = (merged[-1][0], merged[-1][1] + length)
                else:
                    merged.append((start, length))
            self._free = merged
            self._changed.notify_all()


def _pages(size: int) -> int:
    return max(PAGE, -(-size // PAGE) * PAGE)


def hand_over(sock: socket.socket, arena: Arena) -> None:
    """The daemon's side of `fetch`: one frame, with the descriptor."""
    buffers = wire.pack({"type": "arena", "size": arena.size})
    socket.send_fds(sock, [bytes(b) for b in buffers], [arena.handle])


def fetch(path: str, timeout: float = 5.0) -> Arena:
    """Ask the daemon at socket `path` for this replica's arena, on a connection of its own.

    Raises OSError, EOFError or WireError when it has none to give (an older daemon, no shared memory): then blobs
    travel as payloads.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(path)
        for buffer in wire.pack({"type": "arena"}):
            sock.sendall(buffer)
        data, handles, _, _ = socket.recv_fds(sock, 4096, 1)
        if not data or not handles:
            for handle in handles:
                os.close(handle)
            raise EOFError("the daemon gave no shared memory")
        return _open(data, handles[0])


def _open(data: bytes, handle: int) -> Arena:
    try:
        head, _ = struct.unpack_from("!II", data)
        size = int(wire.header(data[8 : 8 + head])["size"])
        if os.fstat(handle).st_size != size:
            raise wire.WireError("the shared memory has another size than was said")
        return Arena(handle, size)
    except BaseException:
        os.close(handle)
        raise
