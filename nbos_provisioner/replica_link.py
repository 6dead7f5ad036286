"""The router's connections to one replica: CurveZMQ, one identity on shell, control and stdin, a fresh set per process.

Guarantees: `up` only when the handshake is done and the subscription is in force (so no output can be missed); nothing
that was queued for a lost process is ever delivered to its successor.
"""

from __future__ import annotations

from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from .election import BEAT
from .messages import DELIMITER

HIGH_WATER = 200_000
"""Messages kept per connection at most. Memory is bounded by this and by how fast the other side reads."""

WELCOME_PATIENCE = 0.5
"""Seconds to wait for the replica's iopub_welcome, which says that the subscription is in force."""

MONITORED = ("shell", "iopub")
RECONNECT_MAX = 500
"""Milliseconds between two attempts to connect a channel, at most."""

SILENCE = 3.0
"""Seconds of silence after which the executor of a running cell counts as lost."""
DOUBTED = 2.0
"""Seconds of silence after which a replica counts as lost of which no record speaks any more."""

_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class ReplicaLink:
    def __init__(
        self,
        context: zmq.Context[Any],
        index: int,
        ip: str,
        ports: dict[str, int],
        identity: bytes,
        keys: tuple[bytes, bytes, bytes],
    ) -> None:
        self.index = index
        self.ip, self.ports = ip, ports
        self.up = False
        self._shaken: dict[str, float] = {}
        self._welcome = False
        self._beat_at = 0.0
        self._heard = 0.0
        self._looked = 0.0
        self._watched = False
        self._silence = SILENCE
        self._open(context, identity, keys)

    def _open(self, context: zmq.Context[Any], identity: bytes, keys: tuple[bytes, bytes, bytes]) -> None:
        kinds = {
            "shell": zmq.DEALER,
            "control": zmq.DEALER,
            "stdin": zmq.DEALER,
            "iopub": zmq.SUB,
            "hb": zmq.DEALER,
        }
        self.sockets: dict[str, zmq.Socket[Any]] = {}
        self.monitors: dict[str, zmq.Socket[Any]] = {}
        for channel, kind in kinds.items():
            socket = context.socket(kind)
            socket.linger = 0
            socket.set_hwm(HIGH_WATER)
            socket.reconnect_ivl, socket.reconnect_ivl_max = 50, RECONNECT_MAX
            socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = keys
            if channel in ("shell", "control", "stdin"):
                socket.identity = identity
            if channel == "iopub":
                socket.subscribe(b"")
            if channel in MONITORED:
                self.monitors[channel] = socket.get_monitor_socket(_EVENTS)
            socket.connect(f"tcp://{self.ip}:{self.ports[channel]}")
            self.sockets[channel] = socket

    def close(self) -> None:
        for channel in MONITORED:
            self.sockets[channel].disable_monitor()
        for socket in self.sockets.values():
            socket.close(0)

    def monitor_event(self, channel: str, now: float) -> str:
        """Read one event of a monitored connection: 'disconnected' or ''."""
        event = parse_monitor_message(self.monitors[channel].recv_multipart(zmq.NOBLOCK))
        if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._shaken[channel] = now
            return ""
        self._shaken.pop(channel, None)
        return "disconnected" if event["event"] == zmq.EVENT_DISCONNECTED else ""

    def _connected(self) -> float | None:
        """Since when shell and iopub are both connected. Each of them tries again at times of its own, up to
        RECONNECT_MAX apart: a replica that answers on one may not have the other's subscription for long."""
        return max(self._shaken.values()) if len(self._shaken) == len(MONITORED) else None

    def is_welcome(self, frames: list[Any]) -> bool:
        """Whether this is the replica's iopub_welcome (it has no topic)."""
        if len(frames[0]) != len(DELIMITER) or frames[0].bytes != DELIMITER:
            return False
        self._welcome = True
        return True

    def becomes_up(self, now: float) -> bool:
        connected = self._connected()
        if self.up or connected is None:
            return False
        self.up = self._welcome or now >= connected + WELCOME_PATIENCE
        return self.up

    def wake(self) -> float | None:
        if not self.up:
            connected = self._connected()
            return None if connected is None else connected + WELCOME_PATIENCE
        return min(self._beat_at, self._heard + self._silence) if self._watched else None

    def heard(self, now: float) -> None:
        self._heard = now

    def watch(self, on: bool, now: float, silence: float = SILENCE) -> bool:
        """Keep the heartbeat going while `on`; False when the replica has been silent for longer than `silence`.

        Called every BEAT at the latest (`wake`). Where it is not, this process itself stood still, and time in which
        nobody was asked and nobody was heard is not silence.
        """
        self._silence = silence
        if on and not self._watched:
            self._heard = now
            self._beat_at = now
        elif on:
            self._heard += max(0.0, now - self._looked - BEAT)
        self._watched, self._looked = on, now
        if not on:
            return True
        if now >= self._beat_at:
            self._beat_at = now + BEAT
            try:
                self.sockets["hb"].send_multipart([b"", b"nbos"], zmq.NOBLOCK)
            except zmq.Again:
                return now < self._heard + silence
        return now < self._heard + silence
