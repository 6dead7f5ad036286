"""A connection to a replica is up when no output can be missed, whichever of its channels is there first."""

from __future__ import annotations

import time

import zmq

from nbos_provisioner.election import BEAT
from nbos_provisioner.replica_link import SILENCE, WELCOME_PATIENCE, ReplicaLink
from tests.system.ports import free_ports

from .rig import CHANNELS


def bound(context: zmq.Context[zmq.Socket[bytes]], kind: int, port: int, secret: bytes) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.curve_server, socket.curve_secretkey = True, secret
    socket.bind(f"tcp://127.0.0.1:{port}")
    return socket


def events(link: ReplicaLink) -> None:
    for channel, monitor in link.monitors.items():
        while monitor.poll(0):
            link.monitor_event(channel, time.monotonic())


def test_a_replica_whose_outputs_cannot_be_heard_yet_is_not_up() -> None:
    public, secret = zmq.curve_keypair()
    ports = dict(zip(CHANNELS, free_ports(5), strict=True))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    servers = [bound(context, zmq.ROUTER, ports["shell"], secret)]
    link = ReplicaLink(context, 0, "127.0.0.1", ports, b"router", (public, secret, public))
    try:
        deadline = time.monotonic() + 10
        while "shell" not in link._shaken and time.monotonic() < deadline:
            events(link)
        shaken = link._shaken["shell"]
        assert not link.becomes_up(shaken + 10 * WELCOME_PATIENCE)  # the time as it would be then: nobody waits here
        servers.append(bound(context, zmq.XPUB, ports["iopub"], secret))
        while not link.becomes_up(time.monotonic()) and time.monotonic() < deadline:
            events(link)
        servers[1].send_multipart([b"output"])
        assert link.sockets["iopub"].poll(5000), "an output was missed"
    finally:
        link.close()
        context.destroy(linger=0)


def test_time_in_which_the_router_itself_stood_still_is_not_a_replicas_silence() -> None:
    """The times are what they would be: nobody answers here, and nobody waits."""
    public, secret = zmq.curve_keypair()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ports = dict(zip(CHANNELS, free_ports(5), strict=True))
    link = ReplicaLink(context, 0, "127.0.0.1", ports, b"router", (public, secret, public))
    try:
        assert link.watch(True, 100.0)
        assert link.watch(True, 100.0 + BEAT)
        link.heard(100.0 + BEAT)
        assert link.watch(True, 160.0), "its host was asleep"
        assert link.watch(True, 160.0 + BEAT)
        assert not link.watch(True, 160.0 + BEAT + SILENCE)
        assert link.watch(False, 170.0)
        assert link.watch(True, 270.0)
        ticks = [link.watch(True, 270.0 + tick * BEAT) for tick in range(1, 6)]
        assert ticks == [tick < SILENCE / BEAT for tick in range(1, 6)], "a replica's own silence counts as ever"
    finally:
        link.close()
        context.destroy(linger=0)
