"""The form a log entry has on the daemon's socket (docs/protocol.md, "An entry, on this socket"), both ways.

Small frames stand in the message's payload, larger ones are blobs that are stored before the entry is appended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from nbos_cluster import wire

from .capture.changes import FrameData, Packed

INLINE_BUDGET = wire.ENTRY_LIMIT // 2
"""Bytes of one entry's inline frames; the other half is for names, source and the JSON around them."""


class Layout:
    """Which frames of these components stand inline. `inline_limit` 0 sends everything to blobs."""

    def __init__(self, components: Sequence[Packed], inline_limit: int = wire.INLINE_LIMIT) -> None:
        self._limit = inline_limit
        total = sum(f.size for c in components for f in c.frames if f.size <= inline_limit)
        if total > INLINE_BUDGET:
            self._limit = 0

    def inline(self, frame: FrameData) -> bool:
        return frame.size <= self._limit

    def blobs(self, components: Sequence[Packed]) -> Iterator[tuple[Packed, str, memoryview]]:
        """(component, hash, bytes) of everything that has to be stored first."""
        for component in components:
            for frame in component.frames:
                if not self.inline(frame):
                    for digest, chunk in frame.chunks():
                        yield component, digest, chunk

    def encode(self, components: Sequence[Packed]) -> tuple[list[dict[str, Any]], bytes]:
        """The entry's `components` and its payload."""
        payload = bytearray()
        encoded = []
        for component in components:
            frames: list[dict[str, Any]] = []
            for frame in component.frames:
                if self.inline(frame):
                    frames.append({"size": frame.size, "at": len(payload)})
                    payload += frame.data
                else:
                    frames.append({"size": frame.size, "blobs": list(frame.hashes)})
            encoded.append({"names": list(component.names), "digest": component.digest, "frames": frames})
        return encoded, bytes(payload)


async def frames_of(
    component: Mapping[str, Any], payload: bytes, get_blob: Callable[[str], Awaitable[bytes]]
) -> list[bytearray]:
    """The frames of one component in memory of their own, writable: arrays are built on them without a copy."""
    frames = []
    for frame in component["frames"]:
        data = bytearray(frame["size"])
        if "at" in frame:
            data[:] = payload[frame["at"] : frame["at"] + frame["size"]]
        else:
            at = 0
            for digest in frame["blobs"]:
                blob = await get_blob(digest)
                data[at : at + len(blob)] = blob
                at += len(blob)
            if at != frame["size"]:
                raise ValueError(f"a value of {frame['size']} bytes came as {at} bytes")
        frames.append(data)
    return frames
