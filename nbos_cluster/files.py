"""Descriptors of stored blobs, which a daemon hands to a replica so that it reads them itself. Standard library only.

A replica asks on a connection of its own (`ask`), as for the arena, and is given one descriptor for each blob that the
daemon can hand out (`hand_over`); each is open for reading only, on a file that never changes.

Guarantees: `ask` never leaves a descriptor open that it does not return; what a descriptor shows is not checked here:
whoever reads compares it with the address (`content`).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Sequence

from . import wire

AT_ONCE = 64
"""Blobs that are asked for together: so many descriptors are open at a time."""

_PREFIX = struct.Struct("!II")


def hand_over(sock: socket.socket, handles: Sequence[int | None]) -> None:
    """The daemon's side of `ask`: one frame that says which there are, with their descriptors."""
    there = [handle is not None for handle in handles]
    data = b"".join(bytes(b) for b in wire.pack({"type": "files", "there": there}))
    socket.send_fds(sock, [data], [handle for handle in handles if handle is not None])


def ask(path: str, digests: Sequence[str], timeout: float = 5.0) -> list[int | None]:
    """A descriptor for each of these blobs (AT_ONCE at most), None for those that the daemon hands out none of.

    Raises OSError, EOFError or WireError when it does not answer in this way; then blobs are asked for one by one
    (`get_blob`).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(path)
        for buffer in wire.pack({"type": "files", "hashes": list(digests)}):
            sock.sendall(buffer)
        data, handles, _, _ = socket.recv_fds(sock, 65536, AT_ONCE)
    try:
        return _matched(data, list(handles), len(digests))
    except BaseException:
        close(handles)
        raise


def close(handles: Iterable[int | None]) -> None:
    for handle in handles:
        if handle is not None:
            os.close(handle)


def _matched(data: bytes, handles: list[int], wanted: int) -> list[int | None]:
    if not data:
        raise EOFError("the daemon hands out no files")
    head, _ = _PREFIX.unpack_from(data)
    there = wire.header(data[_PREFIX.size : _PREFIX.size + head])["there"]
    if len(there) != wanted or sum(map(bool, there)) != len(handles):
        raise wire.WireError("the daemon handed out other files than it says")
    left = iter(handles)
    return [next(left) if each else None for each in there]
