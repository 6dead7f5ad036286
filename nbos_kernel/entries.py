"""The form a log entry has on the daemon's socket (docs/protocol.md, "An entry, on this socket"), both ways.

Small frames stand in the message's payload, larger ones are blobs that are stored before the entry is appended.
"""

from __future__ import annotations

import bisect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from operator import eq
from typing import Any

from nbos_cluster import marks, wire

from .blobchannel import Target
from .capture import arrays, buffers
from .capture.buffers import FrameData
from .capture.changes import Packed
from .capture.weak import LoadersReference
from .fitting import Wanted

INLINE_BUDGET = 8 * 1024 * 1024
"""Bytes of one entry's inline frames; where they are too many for etcd, the daemon puts them into one table."""


class Layout:
    """Which frames of these components stand inline. `inline_limit` 0 sends everything to blobs."""

    def __init__(self, components: Sequence[Packed], inline_limit: int = wire.INLINE_LIMIT) -> None:
        self._limit = inline_limit
        total = sum(f.size for c in components for f in c.frames if f.size <= inline_limit)
        if total > INLINE_BUDGET:
            self._limit = 0

    def inline(self, frame: FrameData) -> bool:
        return frame.size <= self._limit

    def blobs(self, components: Sequence[Packed]) -> Iterator[Wanted]:
        """Everything that has to be stored first."""
        for component in components:
            for frame in component.frames:
                if not self.inline(frame):
                    for chunk, data in frame.chunks():
                        yield component, chunk, data

    def encode(self, components: Sequence[Packed]) -> tuple[list[dict[str, Any]], bytes]:
        """The entry's `components` and its payload, once all addresses are known."""
        payload = bytearray()
        encoded = []
        for component in components:
            frames: list[dict[str, Any]] = []
            for frame in component.frames:
                if self.inline(frame):
                    frames.append({"size": frame.size, "at": len(payload)})
                    payload += frame.data
                else:
                    frames.append(_of_blobs(frame))
            encoded.append({"names": list(component.names), "digest": component.digest, "frames": frames})
        return encoded, bytes(payload)


def _of_blobs(frame: FrameData) -> dict[str, Any]:
    if not all(frame.hashes):
        raise ValueError(f"an entry names a chunk of a frame of {frame.size} bytes that was not stored")
    found: dict[str, Any] = {"size": frame.size, "blobs": list(frame.hashes)}
    known = [chunk.mark for chunk in frame.marks.chunks]
    if known and all(len(mark) == marks.SIZE for mark in known):
        found["marks"] = b"".join(known).hex()
    return found


Held = tuple[tuple[str, ...], Any]
"""The hashes of a frame, and a weak reference to its memory."""


class Memory:
    """The memory that loaded frames lie in, so that the next version of a value needs only the chunks that differ.

    Valid while this replica runs no cell of its own: `forget()` before. Holds nothing alive.
    """

    def __init__(self) -> None:
        self._held: dict[str, list[Held]] = {}
        self._replaced: frozenset[str] = frozenset()

    def begin(self, replaced: Iterable[str]) -> None:
        """An entry is loaded that binds or removes all of these names: what they alone refer to may be overwritten."""
        self._replaced = frozenset(replaced)

    def drop(self, names: Iterable[str]) -> None:
        """These names are gone. What they shared with others is the others' now."""
        for name in names:
            self._held.pop(name, None)

    def take(self, names: Sequence[str], wanted: Sequence[tuple[int, Sequence[str]]]) -> list[tuple[Any, set[int]]]:
        """Memory for the frames of a component, given as (size, hashes), and the numbers of the chunks that are in it
        already. What the version before lay in is used again also where no chunk is the same: to get new memory costs
        the system more than to fill it."""
        found: dict[int, tuple[Any, set[int]]] = {}
        for least in (1, 0):  # what is wanted as it is first, then what is only room
            for number, (size, hashes) in enumerate(wanted):
                if number not in found:
                    again = self._again(names, size, hashes, least)
                    if again is not None:
                        found[number] = again
        return [found.get(number) or (arrays.memory(size), set()) for number, (size, _) in enumerate(wanted)]

    def _again(self, names: Sequence[str], size: int, hashes: Sequence[str], least: int) -> tuple[Any, set[int]] | None:
        best: tuple[int, Any, tuple[str, ...]] = (least - 1, None, ())
        for held, _ in self._lists(names):
            for before, reference in held:
                if len(before) != len(hashes):
                    continue
                same = sum(map(eq, before, hashes))
                memory = reference() if same > best[0] else None
                if memory is not None and memory.nbytes == size and self._free(memory, names, same):
                    best = (same, memory, before)
        _, memory, before = best
        if memory is None:
            return None
        for held, holders in self._lists(self._held):  # given once: two frames never share memory
            left = [each for each in held if each[1]() is not memory]
            if len(left) != len(held):
                self._held.update(dict.fromkeys(holders, left))
        memory.flags.writeable = True
        return memory, {number for number, (one, other) in enumerate(zip(before, hashes, strict=True)) if one == other}

    def _free(self, memory: Any, names: Sequence[str], same: int) -> bool:
        """Whether no variable that stays as it is lies in this memory. What another component of the entry may want is
        left to it, unless something in it is wanted here."""
        allowed = self._replaced.union(names) if same else set(names)
        return all(
            allowed.issuperset(holders) or all(each[1]() is not memory for each in held)
            for held, holders in self._lists(self._held)
        )

    def _lists(self, names: Iterable[str]) -> list[tuple[list[Held], list[str]]]:
        """What is held for these names, and by which of them: the names of a component have one list in common."""
        found: dict[int, tuple[list[Held], list[str]]] = {}
        for name in names:
            held = self._held.get(name)
            if held:
                found.setdefault(id(held), (held, []))[1].append(name)
        return list(found.values())

    def keep(self, names: Sequence[str], frames: Sequence[tuple[tuple[str, ...], Any]]) -> None:
        """`frames`: hashes and memory of each large frame of a component that is loaded now."""
        held = [(hashes, LoadersReference(memory)) for hashes, memory in frames if not isinstance(memory, bytearray)]
        for name in names:
            self._held.pop(name, None)
            if held:
                self._held[name] = held

    def forget(self) -> None:
        self._held.clear()


def has_blobs(message: Mapping[str, Any]) -> bool:
    """Whether an entry that was pushed names blobs, as far as can be told without reading them."""
    entry = message.get("entry", message)
    components = entry.get("components") or ()
    return bool(entry.get("tables")) or any("blobs" in frame for each in components for frame in each["frames"])


Read = Callable[[Sequence[str], Target, int], Awaitable[int]]
"""`read(hashes, target, chunk)` fills a Target with blobs of at most `chunk` bytes; returns how many bytes they had."""


async def frames_of(component: Mapping[str, Any], payload: bytes, read: Read, memory: Memory) -> list[Any]:
    """The frames of one component in writable memory of their own: arrays are built on them without a copy."""
    frames: list[Any] = []
    large: list[tuple[tuple[str, ...], Any]] = []
    missing = Missing()
    apart = [frame for frame in component["frames"][1:] if "at" not in frame]
    rooms = iter(memory.take(component["names"], [(frame["size"], frame["blobs"]) for frame in apart]))
    for frame in component["frames"]:
        if "at" in frame:
            data = arrays.memory(frame["size"]) if frames else bytearray(frame["size"])
            memoryview(data)[:] = payload[frame["at"] : frame["at"] + frame["size"]]
        elif not frames:
            data = bytearray(frame["size"])
            missing.add(memoryview(data), frame, set())
        else:
            data, there = next(rooms)
            missing.add(_bytes(data), frame, there)
            large.append((tuple(frame["blobs"]), data))
        frames.append(data)
    await missing.fetch(read)
    memory.keep(component["names"], large)
    return frames


def _bytes(memory: Any) -> memoryview:
    return memoryview(memory if isinstance(memory, bytearray) else memory.reshape(-1).view("uint8"))


class Missing:
    """The chunks of a component that are still to be fetched, each with its place. All are asked for in one go: a model
    has many frames, and to wait for the last chunk of each would leave the daemon idle in between."""

    def __init__(self) -> None:
        self._hashes: list[str] = []
        self._places: list[memoryview] = []
        self._ends: list[int] = []
        self._step = 1
        self.nbytes = 0
        self.marks: dict[str, bytes] = {}
        """The marks of blobs, by address, as far as the log has them."""

    def add(self, view: memoryview, frame: Mapping[str, Any], there: set[int]) -> None:
        """A frame; all its chunks but the last have the same size, and those in `there` need no fetching."""
        step = buffers.chunk_size(view.nbytes)
        self.marks.update(zip(frame["blobs"], buffers.marks_of(frame), strict=False))
        for number, digest in enumerate(frame["blobs"]):
            if number not in there:
                place = view[number * step : (number + 1) * step]
                self._hashes.append(digest)
                self._places.append(place)
                self.nbytes += place.nbytes
                self._ends.append(self.nbytes)
                self._step = max(self._step, step)

    async def fetch(self, read: Read) -> None:
        if self._hashes:
            size = await read(self._hashes, self, self._step)
            if size != self.nbytes:
                raise ValueError(f"a value of {self.nbytes} bytes came as {size} bytes")

    def place(self, at: int, size: int) -> memoryview | None:
        """Where these bytes belong, if that is all of one place."""
        number = bisect.bisect_right(self._ends, at)
        found = self._places[number] if number < len(self._places) else None
        fits = found is not None and self._ends[number] == at + size and found.nbytes == size
        return found if fits else None

    def __setitem__(self, where: slice, data: bytes | memoryview) -> None:
        """Fill the places as if they were one run of bytes."""
        at, data = where.start or 0, memoryview(data)
        number = bisect.bisect_right(self._ends, at)
        while data.nbytes:
            place = self._places[number]
            start = at - (self._ends[number] - place.nbytes)
            part = data[: place.nbytes - start]
            place[start : start + part.nbytes] = part
            at, data, number = at + part.nbytes, data[part.nbytes :], number + 1
