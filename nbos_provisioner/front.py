"""The sockets that clients connect to: a kernel's five channels, CurveZMQ servers with the kernel's own pair.

Guarantees: ip and ports stay for the life of the process; the heartbeat is answered by a thread of its own, in libzmq,
however busy the router is; a new subscriber gets an iopub_welcome as from ipykernel 7.2.
"""

from __future__ import annotations

import errno
import threading
from typing import Any

import zmq

from nbos_cluster.ports import PORT_RANGE

from .messages import MAX_MESSAGE, Signer
from .replica_link import HIGH_WATER

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")


class Front:
    def __init__(
        self, context: zmq.Context[Any], ip: str, ports: dict[str, int], publickey: bytes, secretkey: bytes
    ) -> None:
        self._keys = (publickey, secretkey)
        self.ip = ip
        self.ports: dict[str, int] = {}
        self.sockets: dict[str, zmq.Socket[Any]] = {}
        for channel in ("shell", "control", "stdin"):
            self.sockets[channel] = self._bind(context.socket(zmq.ROUTER), channel, ports)
            self.sockets[channel].router_handover = 1
        iopub = context.socket(zmq.XPUB)
        iopub.xpub_verbose = 1  # tells of every subscriber, not only of the first to a topic
        self.sockets["iopub"] = self._bind(iopub, "iopub", ports)
        # A context of its own: the heartbeat must not wait for this process's Python, nor for its other sockets.
        beat = self._bind(zmq.Context().socket(zmq.ROUTER), "hb", ports)
        threading.Thread(target=_echo, args=(beat,), name="heartbeat", daemon=True).start()

    def _bind(self, socket: zmq.Socket[Any], channel: str, ports: dict[str, int]) -> zmq.Socket[Any]:
        socket.linger = 1000 if channel != "hb" else 0
        socket.set_hwm(HIGH_WATER)
        socket.maxmsgsize = MAX_MESSAGE
        socket.curve_publickey, socket.curve_secretkey = self._keys
        socket.curve_server = True
        wanted = ports.get(channel, 0)
        try:
            if wanted:
                socket.bind(f"tcp://{self.ip}:{wanted}")
            else:
                wanted = socket.bind_to_random_port(f"tcp://{self.ip}", *PORT_RANGE)
        except zmq.ZMQError as err:
            raise OSError(f"cannot listen on {self.ip}:{wanted} for {channel}: {err}") from err
        self.ports[channel] = wanted
        return socket

    def welcome(self, signer: Signer) -> bool:
        """Answer subscriptions with an iopub_welcome; whether there was one."""
        iopub = self.sockets["iopub"]
        came = False
        while iopub.poll(0):
            event = iopub.recv()
            if event[:1] != b"\x01":
                continue
            topic = event[1:]
            _, frames = signer.make("iopub_welcome", {"subscription": topic.decode("utf-8", "replace")})
            iopub.send_multipart([topic, *frames] if topic else frames)
            came = True
        return came

    def close(self) -> None:
        for socket in self.sockets.values():
            socket.close()


def _echo(socket: zmq.Socket[Any]) -> None:
    while True:
        try:
            zmq.proxy(socket, socket)
        except zmq.ZMQError as err:
            if err.errno != errno.EINTR:
                return
