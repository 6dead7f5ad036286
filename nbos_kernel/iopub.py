"""Outputs carry the fencing token: every iopub message leaves with the topic `nbos.<token>.` + ipykernel's own.

The router passes on only what carries the current claim's token, so an executor that was cut off cannot speak
for its cell any more. The prefix is put on in the IOPub thread, when a message leaves: a token that the daemon
renewed in the middle of a cell holds for everything from then on. Messages of forked children pass the parent
once and are prefixed there. The port on which they reach the parent is encrypted as all others: whoever connects
to it needs a key that only the parent and what it forked have.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import zmq
from ipykernel.iostream import IOPubThread, OutStream
from jupyter_client.session import DELIM
from zmq.eventloop.zmqstream import ZMQStream

from .keeping import TOPIC, Keeper

MEMBERS_TOPIC = b"nbos.members"
_MASTER = 0


class FencedIOPubThread(IOPubThread):
    """ipykernel's IOPub thread, with the token before every topic. `fence` may be called from any thread."""

    prefix = b"nbos.0."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keeper = Keeper()

    def publish_kept(self, session: Any) -> None:
        """Say what was kept, for the router; on this thread, between what it has kept and what comes after."""

        def publish() -> None:
            message = session.msg("nbos_outputs", self.keeper.dump(), parent={})
            self._really_send(session.serialize(message, ident=[TOPIC]))

        self.schedule(publish)

    def fence(self, token: int) -> None:
        self.prefix = b"nbos.%d." % token

    def _setup_pipe_in(self) -> None:
        """As ipykernel's, with keys: its own port takes and shows messages in clear."""
        self._pipe_uuid = os.urandom(16)
        self._pipe_keys = zmq.curve_keypair()
        pipe_in = self.socket.context.socket(zmq.PULL)
        pipe_in.linger = 0
        pipe_in.curve_publickey, pipe_in.curve_secretkey = self._pipe_keys
        pipe_in.curve_server = True
        try:
            self._pipe_port = pipe_in.bind_to_random_port("tcp://127.0.0.1")
        except zmq.ZMQError as err:
            warnings.warn(f"no port for the output of forked processes, it will be missing: {err}", stacklevel=2)
            self._pipe_flag = False
            pipe_in.close()
            return
        self._pipe_in = ZMQStream(pipe_in, self.io_loop)
        self._pipe_in.on_recv(self._handle_pipe_msg)

    def _setup_pipe_out(self) -> tuple[Any, Any]:
        """In a forked child, for each of its messages."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        pipe_out = context.socket(zmq.PUSH)
        pipe_out.linger = 3000
        pipe_out.curve_publickey, pipe_out.curve_secretkey = self._pipe_keys
        pipe_out.curve_serverkey = self._pipe_keys[0]
        pipe_out.connect(f"tcp://127.0.0.1:{self._pipe_port}")
        return context, pipe_out

    def _really_send(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        if self._check_mp_mode() == _MASTER:
            self.keeper.see(msg)
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
