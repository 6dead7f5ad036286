"""The frames between a replica and its daemon (Unix socket), standard library only: it runs in the user's
image.

A frame is `u32 header length, u32 payload length` (big endian), a JSON object, then raw bytes. The JSON
object has a `type`; requests carry an `id`, and the reply repeats it under `re`. docs/protocol.md lists the
messages.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

_PREFIX = struct.Struct("!II")

FORMAT = 1
"""How the messages of this conversation are written; a change that the other side would misunderstand raises it."""

OLDEST = 1
"""The oldest format that a daemon of this version serves. Kernel images may be older than the daemons, not newer."""

MAX_HEADER = 4 * 1024 * 1024
"""Bytes of JSON in one frame."""

MAX_PAYLOAD = 64 * 1024 * 1024
"""Bytes after it; larger values travel as several blobs."""

BLOB_CHUNK = 16 * 1024 * 1024
"""Bytes of one blob at most; a longer frame of state is cut into several."""

INLINE_LIMIT = 32 * 1024
"""A frame of state up to this many bytes stands in the log entry itself."""

ENTRY_LIMIT = 512 * 1024
"""Bytes of one log entry in etcd; beyond it every frame becomes a blob."""


class WireError(ConnectionError):
    """The other side broke the protocol; says how. The connection is of no further use."""


Message = dict[str, Any]


def pack(message: Message, payload: bytes | bytearray | memoryview = b"") -> list[bytes | memoryview]:
    """The buffers to write for one frame. Raises WireError when it is over a limit."""
    header = json.dumps(message, separators=(",", ":")).encode()
    size = memoryview(payload).nbytes
    _check(len(header), size)
    head = _PREFIX.pack(len(header), size) + header
    return [head, memoryview(payload)] if size else [head]


async def read(reader: asyncio.StreamReader) -> tuple[Message, bytes]:
    """The next frame. Raises asyncio.IncompleteReadError at the end of the stream, WireError on a broken
    frame."""
    head, size = _PREFIX.unpack(await reader.readexactly(_PREFIX.size))
    _check(head, size)
    message = header(await reader.readexactly(head))
    return message, await reader.readexactly(size) if size else b""


def receive(sock: socket.socket) -> tuple[Message, bytes]:
    """The next frame of a blocking socket. Raises EOFError at the end of the stream, WireError on a broken
    frame."""
    head, size = _PREFIX.unpack(_exactly(sock, _PREFIX.size))
    _check(head, size)
    message = header(bytes(_exactly(sock, head)))
    return message, bytes(_exactly(sock, size)) if size else b""


def _exactly(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError("the other side closed the connection")
        view = view[got:]
    return data


def header(raw: bytes) -> Message:
    """The JSON object of a frame. Raises WireError."""
    try:
        message = json.loads(raw)
    except ValueError as err:
        raise WireError(f"a frame's header is not JSON: {err}") from err
    if not isinstance(message, dict) or not isinstance(message.get("type", message.get("re")), str | int):
        raise WireError("a frame's header is no object with a 'type' or 're'")
    return message


def _check(header: int, payload: int) -> None:
    if header > MAX_HEADER:
        raise WireError(f"a frame's header has {header} bytes, at most {MAX_HEADER} are read")
    if payload > MAX_PAYLOAD:
        raise WireError(f"a frame's payload has {payload} bytes, at most {MAX_PAYLOAD} are read")
