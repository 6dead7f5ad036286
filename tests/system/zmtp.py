"""A ZeroMQ port seen from outside: what it offers before any secret is known, and what a stranger gets from it."""

from __future__ import annotations

import socket
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

_SIGNATURE = b"\xff" + b"\0" * 7 + b"\x01\x7f"
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_ENDED = _FAILED | zmq.EVENT_DISCONNECTED


def mechanism(port: int, ip: str = "127.0.0.1", seconds: float = 10.0) -> str:
    """The security mechanism that the port demands ('NULL' is none), by its greeting (RFC 23/ZMTP 3.0)."""
    with socket.create_connection((ip, port), seconds) as connection:
        connection.sendall(_SIGNATURE + b"\x03")  # no more: who has read our mechanism hangs up if it is not theirs
        greeting = b""
        while len(greeting) < 64 and (part := connection.recv(64 - len(greeting))):
            greeting += part
    if len(greeting) < 32:
        raise ConnectionError(f"port {port} does not speak ZMTP 3: {greeting!r}")
    return greeting[12:32].rstrip(b"\0").decode()


def stranger_gets(kind: int, port: int, ip: str = "127.0.0.1", seconds: float = 10.0, keys: bool = False) -> str:
    """What a client without the kernel's keys gets from a port: 'refused', or the message itself.

    keys: it speaks CurveZMQ, with keys of its own and a guess for the server's; else it speaks in clear.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = context.socket(kind)
    stranger.linger = 0
    if keys:
        stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
        stranger.curve_serverkey = zmq.curve_keypair()[0]
    # A server that cannot open a greeting just hangs up; libzmq reports that as a disconnection.
    monitor = stranger.get_monitor_socket(_ENDED)
    try:
        stranger.connect(f"tcp://{ip}:{port}")
        if kind == zmq.SUB:
            stranger.subscribe(b"")
        else:
            stranger.send_multipart([b"", b"ping"])
        poller = zmq.Poller()
        poller.register(stranger, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(poller.poll(left * 1000))
            if stranger in ready:
                return repr(stranger.recv_multipart())
            if monitor in ready and recv_monitor_message(monitor)["event"] & _ENDED:
                return "refused"
        return "let in, and told nothing"
    finally:
        stranger.disable_monitor()
        context.destroy(linger=0)


SOCKETS = {"shell": zmq.DEALER, "control": zmq.DEALER, "stdin": zmq.DEALER, "hb": zmq.DEALER, "iopub": zmq.SUB}
"""What a client opens for each channel."""
