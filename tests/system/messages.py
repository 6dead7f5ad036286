"""The two ways a Jupyter message travels over a websocket, chosen by the subprotocol that server and
proxies agree on.

`v1.kernel.websocket.jupyter.org` is what JupyterLab asks for. A proxy that passes on no subprotocol (the
Python configurable-http-proxy 0.4) leaves the older one: JSON text, or binary when there are buffers.
"""

from __future__ import annotations

import itertools
import json
import struct
import time
from dataclasses import dataclass
from typing import Any

SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"

Json = dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One message of the Jupyter protocol; `at` is time.perf_counter() when it arrived."""

    channel: str
    header: Json
    parent: Json
    metadata: Json
    content: Json
    buffers: tuple[bytes, ...] = ()
    at: float = 0.0

    @property
    def type(self) -> str:
        return str(self.header["msg_type"])


def pack_v1(message: Message) -> bytes:
    """One frame of the v1 subprotocol: the number of offsets, the offsets (u64, little endian), then the
    parts.
    """
    bodies = (message.header, message.parent, message.metadata, message.content)
    parts = [message.channel.encode(), *(json.dumps(body).encode() for body in bodies), *message.buffers]
    offsets = [8 * (len(parts) + 2)]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    head = [len(offsets), *offsets]
    return b"".join([*(number.to_bytes(8, "little") for number in head), *parts])


def unpack_v1(frame: bytes) -> Message:
    count = int.from_bytes(frame[:8], "little")
    offsets = [int.from_bytes(frame[8 * i + 8 : 8 * i + 16], "little") for i in range(count)]
    channel, *parts = (frame[a:b] for a, b in itertools.pairwise(offsets))
    header, parent, metadata, content = (json.loads(part) for part in parts[:4])
    return Message(channel.decode(), header, parent, metadata, content, tuple(parts[4:]), time.perf_counter())


def pack_legacy(message: Message) -> str | bytes:
    """JSON text, or `u32 count, u32 offsets…` (big endian), the JSON and the buffers."""
    body = {
        "channel": message.channel,
        "header": message.header,
        "parent_header": message.parent,
        "metadata": message.metadata,
        "content": message.content,
        "buffers": [],
    }
    if not message.buffers:
        return json.dumps(body)
    del body["buffers"]
    parts = [json.dumps(body).encode(), *message.buffers]
    offsets = [4 * (len(parts) + 1)]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + len(part))
    return struct.pack(f"!{len(parts) + 1}I", len(parts), *offsets) + b"".join(parts)


def unpack_legacy(frame: str | bytes) -> Message:
    buffers: tuple[bytes, ...] = ()
    text: str | bytes = frame
    if isinstance(frame, bytes):
        (count,) = struct.unpack("!I", frame[:4])
        offsets = [*struct.unpack(f"!{count}I", frame[4 : 4 * (count + 1)]), len(frame)]
        text, *rest = (frame[a:b] for a, b in itertools.pairwise(offsets))
        buffers = tuple(rest)
    body = json.loads(text)
    return Message(
        body["channel"],
        body["header"],
        body["parent_header"],
        body["metadata"],
        body["content"],
        buffers,
        time.perf_counter(),
    )
