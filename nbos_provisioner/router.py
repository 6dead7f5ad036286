"""The router process, `python -m nbos_provisioner.router`: the front door of one kernel.

Guarantees: its ip and ports never change while it lives; what it decides is decided by `router_core.RouterCore`, this
module only carries it out; it holds keys in memory only (they arrive on stdin, never on the command line), and ends
when its stdin closes, that is, when the Jupyter Server is gone.

A plain loop around one poller: asyncio's zmq costs about 100 µs a hop, and this process is on the path of every output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq

from nbos_cluster.kept import Bounds

from .following import Follower
from .front import Front
from .instructions import (
    Alive,
    Client,
    Connect,
    Disconnect,
    FromReplica,
    Log,
    Lost,
    Output,
    Publish,
    Reset,
    Subscribed,
    Tell,
    Tick,
    ToClient,
    ToReplica,
    Up,
)
from .members import members_from
from .memory import Memory, system_trim
from .messages import BadMessage, Signer, parse
from .notices import LINE_AFTER
from .replica_link import DOUBTED, SILENCE, ReplicaLink
from .router_core import RouterCore
from .sockets import receive, send

BATCH = 500
"""Messages read from one socket before the others get their turn."""

LONELY = 1.0
"""Seconds without any replica after which the gateway is asked for the members (and again)."""


class Router:
    def __init__(self, config: dict[str, Any]) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.signer = Signer(config["key"].encode())
        public, secret = (str(config.get(f"curve_{half}key") or "").encode() for half in ("public", "secret"))
        if not public or not secret:
            raise ValueError("the kernel has no CurveZMQ keys, and its messages never travel in clear")
        self.front = Front(self.context, config.get("ip", "127.0.0.1"), config.get("ports") or {}, public, secret)
        named = {f"{channel}_port": port for channel, port in self.front.ports.items()}
        self.core = RouterCore(
            self.signer,
            rerun=bool(config.get("rerun", True)),
            ports=named,
            keep=Bounds(*config["keep"]) if config.get("keep") else None,
            line_after=float(config.get("gpu_line_after", LINE_AFTER)),
        )
        own_public, own_secret = zmq.curve_keypair()
        self._keys = (own_public, own_secret, public)
        self._identity = os.urandom(16).hex().encode()
        self.poller = zmq.Poller()
        self.links: dict[int, ReplicaLink] = {}
        self._sources: dict[Any, Callable[[], None]] = {}
        self._buffer = b""
        self._lonely_at = time.monotonic()
        self._memory = Memory(system_trim())
        self._beats: set[Any] = set()
        self.alive = True
        self._follower = Follower(**config["follow"], log=log) if config.get("follow") else None
        for channel in ("control", "shell", "stdin"):
            self._listen(self.front.sockets[channel], partial(self._read_client, channel))
        self._listen(self.front.sockets["iopub"], self._read_subscriptions)
        self._listen(sys.stdin.fileno(), self._read_commands)
        if self._follower is not None:
            self._listen(self._follower.reader, self._read_members)
        self._carriers: dict[type, Callable[[Any], None]] = {
            Publish: self._publish,
            ToReplica: self._to_replica,
            ToClient: self._to_client,
            Connect: self._connect,
            Disconnect: self._disconnect,
            Tell: lambda instruction: tell(instruction.event),
            Log: lambda instruction: log(instruction.text),
        }

    def _listen(self, source: Any, reader: Callable[[], None]) -> None:
        self.poller.register(source, zmq.POLLIN)
        self._sources[source] = reader

    def _ignore(self, source: Any) -> None:
        self.poller.unregister(source)
        self._sources.pop(source, None)

    # -- the loop

    def run(self) -> None:
        while self.alive:
            ready = self.poller.poll(self._timeout())
            for source, _ in ready:
                reader = self._sources.get(source)
                if reader is not None:
                    reader()
            now = time.monotonic()
            deadline = self.core.deadline()
            if deadline is not None and now >= deadline:
                self._event(Tick(), now)
            self._care(now)
            if any(source not in self._beats for source, _ in ready):
                self._memory.busy(now)
            self._memory.calm(now)
        self.front.close()

    def _timeout(self) -> int | None:
        times = [self.core.deadline(), self._memory.due, self._lonely_at if not self.core.fleet.up else None]
        times += [link.wake() for link in self.links.values()]
        due = [at for at in times if at is not None]
        return max(0, int((min(due) - time.monotonic()) * 1000) + 1) if due else None

    def _care(self, now: float) -> None:
        """New connections, heartbeats, and asking for members when nobody is there."""
        watched = self.core.watched
        for link in list(self.links.values()):
            if link.becomes_up(now):
                self._event(Up(link.index), now)
            doubted = link.index in self.core.doubted
            silence = DOUBTED if doubted else SILENCE
            if link.up and not link.watch(doubted or link.index == watched, now, silence):
                self._renew(link, f"it has not answered heartbeats for {silence:.0f} s", now)
        if self.core.fleet.up:
            self._lonely_at = now + LONELY
        elif now >= self._lonely_at:
            self._lonely_at = now + LONELY
            if self._follower is not None:
                self._follower.ask()

    def _event(self, event: Any, now: float) -> None:
        for instruction in self.core.handle(event, now):
            self._carriers[type(instruction)](instruction)

    # -- reading

    def _read_client(self, channel: Any) -> None:
        socket = self.front.sockets[channel]
        for _ in range(BATCH):
            parts = receive(socket, copy=True)
            if parts is None:
                return
            try:
                message = self.signer.check(parts)
            except BadMessage as err:
                log(f"a message on {channel} was dropped: {err}")
                continue
            self._event(Client(channel, message), time.monotonic())

    def _read_replica(self, link: ReplicaLink, channel: Any) -> None:
        socket = link.sockets[channel]
        for _ in range(BATCH):
            if socket.closed:
                return
            if channel == "shell":
                # What a client sent before it could see this reply stands in the queue first (stop_on_error).
                self._read_client("shell")
            parts = receive(socket, copy=True)
            if parts is None:
                return
            try:
                event = FromReplica(link.index, channel, parse(parts))
            except BadMessage as err:
                log(f"a message of replica {link.index} on {channel} was dropped: {err}")
                continue
            self._event(event, time.monotonic())

    def _read_output(self, link: ReplicaLink) -> None:
        socket = link.sockets["iopub"]
        for _ in range(BATCH):
            if socket.closed:
                return
            frames = receive(socket, copy=False)
            if frames is None:
                return
            if not link.is_welcome(frames):
                self._event(Output(link.index, frames), time.monotonic())

    def _read_beat(self, link: ReplicaLink) -> None:
        link.sockets["hb"].recv_multipart(zmq.NOBLOCK)
        now = time.monotonic()
        link.heard(now)
        self._event(Alive(link.index), now)

    def _read_monitor(self, link: ReplicaLink, channel: str) -> None:
        now = time.monotonic()
        if link.monitor_event(channel, now) == "disconnected" and link.up:
            # The last words of the process are still in the sockets; they come before the news of its end.
            for channel in ("shell", "control", "stdin"):
                self._read_replica(link, channel)
            self._read_output(link)
            self._renew(link, "its connection was closed", now)

    def _read_commands(self) -> None:
        data = os.read(sys.stdin.fileno(), 1 << 16)
        if not data:
            self.alive = False
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._command(json.loads(line))

    def _read_subscriptions(self) -> None:
        if self.front.welcome(self.signer):
            self._event(Subscribed(), time.monotonic())

    def _read_members(self) -> None:
        assert self._follower is not None
        self._event(members_from(self._follower.found()), time.monotonic())

    def _command(self, command: dict[str, Any]) -> None:
        now = time.monotonic()
        if command["command"] == "members":
            self._event(members_from(command), now)
        elif command["command"] == "reset":
            self._event(Reset(), now)
        self._lonely_at = now

    # -- carrying out

    def _publish(self, instruction: Publish) -> None:
        send(self.front.sockets["iopub"], instruction.frames, block=True)

    def _to_client(self, instruction: ToClient) -> None:
        try:
            send(self.front.sockets[instruction.channel], instruction.frames)
        except zmq.Again:
            log(f"a client does not read its {instruction.channel} channel; a message for it was dropped")

    def _to_replica(self, instruction: ToReplica) -> None:
        link = self.links.get(instruction.replica)
        if link is None:
            return
        try:
            send(link.sockets[instruction.channel], instruction.frames)
        except zmq.Again:
            log(f"replica {instruction.replica} does not read its {instruction.channel}; a message was dropped")

    def _connect(self, instruction: Connect) -> None:
        self._disconnect(Disconnect(instruction.replica))
        link = ReplicaLink(
            self.context,
            instruction.replica,
            instruction.ip,
            instruction.ports,
            self._identity,
            self._keys,
        )
        self.links[instruction.replica] = link
        for channel in ("shell", "control", "stdin"):
            self._listen(link.sockets[channel], partial(self._read_replica, link, channel))
        self._listen(link.sockets["iopub"], partial(self._read_output, link))
        self._listen(link.sockets["hb"], partial(self._read_beat, link))
        self._beats.add(link.sockets["hb"])
        for channel, monitor in link.monitors.items():
            self._listen(monitor, partial(self._read_monitor, link, channel))

    def _disconnect(self, instruction: Disconnect) -> None:
        link = self.links.pop(instruction.replica, None)
        if link is None:
            return
        for source in [*link.sockets.values(), *link.monitors.values()]:
            self._ignore(source)
        self._beats.discard(link.sockets["hb"])
        link.close()

    def _renew(self, link: ReplicaLink, reason: str, now: float) -> None:
        """Say that the replica is lost, and connect to its address anew: it may come back there."""
        self._connect(Connect(link.index, link.ip, link.ports))
        self._event(Lost(link.index, reason), now)


def tell(event: dict[str, Any]) -> None:
    """One line for the provisioner, which may read it late (a blocking KernelManager) or never: nobody waits here.

    A closed pipe means that the server is gone; stdin says so as well.
    """
    try:
        os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")
    except (BrokenPipeError, BlockingIOError):
        log(f"the Jupyter Server does not listen to {event['event']}")


def log(text: str) -> None:
    sys.stderr.write(f"[nbos router {os.getpid()}] {text}\n")


def main() -> int:
    line = sys.stdin.buffer.raw.readline()  # type: ignore[union-attr]
    if not line:
        return 0
    os.set_blocking(sys.stdout.fileno(), False)
    try:
        router = Router(json.loads(line))
    except (OSError, ValueError, KeyError, zmq.ZMQError) as err:
        tell({"event": "failed", "reason": f"{type(err).__name__}: {err}"})
        return 1
    tell({"event": "ready", "ip": router.front.ip, "ports": router.front.ports, "pid": os.getpid()})
    router.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
