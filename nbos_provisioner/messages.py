"""Jupyter messages as the router handles them: parsed as little as possible, signed and checked like
jupyter_client does.

Guarantees: a message that is malformed, unsigned, signed with another key or seen before never becomes a `Message`;
frames are kept as they came (zero-copy), so passing a message on costs no copy of its buffers. No IO, and nothing but
the standard library: the router must be small and start quickly.
"""

from __future__ import annotations

import hmac
import json
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

DELIMITER = b"<IDS|MSG>"
PROTOCOL = "5.4"
MAX_SIGNATURES = 65536
"""Signatures remembered against replay, as in jupyter_client's Session."""

MAX_MESSAGE = 256 * 1024 * 1024
"""Bytes of one client message; a larger one is refused."""


_decode, _encode = json.JSONDecoder().decode, json.JSONEncoder(separators=(",", ":")).encode


class BadMessage(ValueError):
    """A message that must not be handled; says why."""


def raw(frame: Any) -> Any:
    """The bytes of a frame: of a zmq.Frame without a copy, or the bytes themselves."""
    return frame.buffer if hasattr(frame, "buffer") else frame


def text(frame: Any) -> bytes:
    return frame.bytes if hasattr(frame, "bytes") else bytes(frame)


def load(frame: Any, what: str) -> dict[str, Any]:
    """The JSON object in `frame`. Raises BadMessage."""
    try:
        value = _decode(text(frame).decode())
    except (ValueError, RecursionError) as err:
        raise BadMessage(f"its {what} is not JSON: {err}") from err
    if not isinstance(value, dict):
        raise BadMessage(f"its {what} is no JSON object")
    return value


def dump(value: Any) -> bytes:
    return _encode(value).encode()


class Message:
    """One message: `idents` in front of the delimiter, then signature, header, parent, metadata, content, buffers."""

    __slots__ = ("_content", "frames", "header", "idents", "msg_id", "msg_type")

    def __init__(self, idents: list[Any], frames: list[Any], header: dict[str, Any]) -> None:
        self.idents = idents
        self.frames = frames
        self.header = header
        self.msg_id: str = header["msg_id"]
        self.msg_type: str = header["msg_type"]
        self._content: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<{self.msg_type} {self.msg_id}>"

    @property
    def content(self) -> dict[str, Any]:
        if self._content is None:
            self._content = load(self.frames[4], "content")
        return self._content

    @property
    def parent(self) -> dict[str, Any]:
        return load(self.frames[2], "parent header")

    @property
    def metadata(self) -> dict[str, Any]:
        return load(self.frames[3], "metadata")

    @property
    def subshell(self) -> Any:
        return self.header.get("subshell_id")

    def wire(self) -> list[Any]:
        return [*self.idents, DELIMITER, *self.frames]


def split(parts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(identities, frames after the delimiter). Raises BadMessage."""
    for position, part in enumerate(parts):
        if len(part) == len(DELIMITER) and text(part) == DELIMITER:
            frames = list(parts[position + 1 :])
            if len(frames) < 5:
                raise BadMessage(f"it has {len(frames)} frames after the delimiter, at least 5 belong there")
            return list(parts[:position]), frames
    raise BadMessage("it has no delimiter <IDS|MSG>")


def parse(parts: Sequence[Any]) -> Message:
    """A message of a replica: its sender is known by CurveZMQ, so the signature is left to the client to check."""
    idents, frames = split(parts)
    return Message(idents, frames, _header(frames[1]))


def _header(frame: Any) -> dict[str, Any]:
    header = load(frame, "header")
    for name in ("msg_id", "msg_type"):
        if not isinstance(header.get(name), str) or not header[name]:
            raise BadMessage(f"its header has no {name}")
    return header


class Signer:
    """Signs and checks with the kernel's key, and makes the router's own messages."""

    def __init__(self, key: bytes, session: str = "") -> None:
        if not key:
            raise ValueError("a kernel's key must not be empty: its messages could be forged")
        self._mac = hmac.new(key, digestmod="sha256")
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._count = 0
        self.session = session or f"nbos-router-{uuid.uuid4().hex}"

    def sign(self, frames: Sequence[Any]) -> bytes:
        mac = self._mac.copy()
        for frame in frames:
            mac.update(raw(frame))
        return mac.hexdigest().encode()

    def check(self, parts: Sequence[Any]) -> Message:
        """The client message in `parts`. Raises BadMessage when it is malformed, forged, replayed or too large."""
        size = sum(len(part) for part in parts)
        if size > MAX_MESSAGE:
            raise BadMessage(f"it has {size} bytes, at most {MAX_MESSAGE} are taken")
        idents, frames = split(parts)
        signature = text(frames[0])
        if not hmac.compare_digest(signature, self.sign(frames[1:5])):
            raise BadMessage("its signature is missing or wrong")
        if signature in self._seen:
            raise BadMessage("its signature was seen before (a replay)")
        self._seen[signature] = None
        if len(self._seen) > MAX_SIGNATURES:
            self._seen.popitem(last=False)
        return Message(idents, frames, _header(frames[1]))

    def with_metadata(self, message: Message, extra: dict[str, Any]) -> list[Any]:
        """The frames of `message` with `extra` added to its metadata, signed anew. Raises BadMessage."""
        metadata = dump({**message.metadata, **extra})
        frames = message.frames
        signature = self.sign([frames[1], frames[2], metadata, frames[4]])
        return [*message.idents, DELIMITER, signature, frames[1], frames[2], metadata, *frames[4:]]

    def header(self, msg_type: str) -> dict[str, Any]:
        self._count += 1
        return {
            "msg_id": f"{self.session}_{self._count}",
            "msg_type": msg_type,
            "username": "nbos",
            "session": self.session,
            "date": datetime.now(UTC).isoformat(),
            "version": PROTOCOL,
        }

    def make(
        self,
        msg_type: str,
        content: dict[str, Any],
        parent: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        speaker: str = "",
    ) -> tuple[str, list[Any]]:
        """(msg_id, frames from the delimiter on) of a new message. speaker: the session it is said in, if not ours."""
        header = self.header(msg_type)
        if speaker:
            header["session"] = speaker
        body = [dump(header), dump(parent or {}), dump(metadata or {}), dump(content)]
        return header["msg_id"], [DELIMITER, self.sign(body), *body]
