"""Whole messages over ZeroMQ sockets, with as little Python between as possible: the router spends its time here.

Guarantees: a message is sent whole or not at all; `receive` gives None when none is there. No flag is combined at run
time (pyzmq's are enums: half a microsecond for each of the 40 frames of a cell), and no exception is raised for a
socket that has nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zmq

_MORE, _NOBLOCK = int(zmq.SNDMORE), int(zmq.NOBLOCK)
_MORE_NOW = _MORE | _NOBLOCK
_EVENTS, _IN = int(zmq.EVENTS), int(zmq.POLLIN)


def receive(socket: zmq.Socket[Any], *, copy: bool) -> list[Any] | None:
    """The next message's frames: bytes with `copy` (cheaper for small ones), else zmq.Frames."""
    if not socket.getsockopt(_EVENTS) & _IN:  # type: ignore[operator]
        return None
    return socket.recv_multipart(_NOBLOCK, copy=copy)


def send(socket: zmq.Socket[Any], frames: Sequence[Any], *, block: bool = False) -> None:
    """Raises zmq.Again when its queue is full, and `block` is not given."""
    more, last = (_MORE, 0) if block else (_MORE_NOW, _NOBLOCK)
    for frame in frames[:-1]:
        socket.send(frame, more, copy=False)
    socket.send(frames[-1], last, copy=False)
