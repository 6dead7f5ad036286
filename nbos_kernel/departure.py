"""Whether the reply to a cell has left this process.

The reply passes ipykernel's shell channel thread, which needs the interpreter for it; the capture, which comes next,
holds that for milliseconds. So the main thread waits for the reply to be gone, not for a time that it may take.
"""

from __future__ import annotations

import threading
from typing import Any

WITHIN = 0.005
"""Seconds after which the capture begins in any case."""


class Departure:
    """`ready` before the reply is handed over, then `gone`; both on the main thread."""

    def __init__(self) -> None:
        self._sent = threading.Event()

    def watch(self, stream: Any) -> None:
        """`stream`: the ZMQStream of the shell channel, before it is used."""
        stream.on_send(lambda *_: self._sent.set())

    def ready(self) -> None:
        self._sent.clear()

    def gone(self, within: float = WITHIN) -> bool:
        """Wait until something was sent since `ready`, for so many seconds at most; whether it was."""
        return self._sent.wait(within)
