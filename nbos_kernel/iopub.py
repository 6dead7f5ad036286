"""Outputs carry the fencing token: every iopub message leaves with the topic `nbos.<token>.` + ipykernel's own.

The router passes on only what carries the current claim's token, so an executor that was cut off cannot speak
for its cell any more. The prefix is put on in the IOPub thread, when a message leaves: a token that the daemon
renewed in the middle of a cell holds for everything from then on. Messages of forked children pass the parent
once and are prefixed there.
"""

from __future__ import annotations

from typing import Any

from ipykernel.iostream import IOPubThread, OutStream
from jupyter_client.session import DELIM

MEMBERS_TOPIC = b"nbos.members"
_MASTER = 0


class FencedIOPubThread(IOPubThread):
    """ipykernel's IOPub thread, with the token before every topic. `fence` may be called from any thread."""

    prefix = b"nbos.0."

    def fence(self, token: int) -> None:
        self.prefix = b"nbos.%d." % token

    def _really_send(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        if self._check_mp_mode() == _MASTER:
            first = bytes(msg[0])
            if first == DELIM:
                msg = [self.prefix, *msg]
            elif first != MEMBERS_TOPIC:
                msg = [self.prefix + first, *msg[1:]]
        super()._really_send(msg, *args, **kwargs)


class LazyOutStream(OutStream):
    """An OutStream whose flush costs nothing when nothing was written.

    ipykernel flushes both streams three times a cell, each time waking the IOPub thread and waiting for it: half
    of the latency of a cell that prints nothing. Order is kept without the wait: a message that was already
    handed to the IOPub thread leaves before whatever is handed to it later.
    """

    def flush(self) -> None:
        with self._buffer_lock:
            empty = not self._buffers
        if not empty:
            super().flush()
