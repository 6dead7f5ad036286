"""The ports at which a replica is reached: chosen free, and looked at again before a start."""

from __future__ import annotations

import contextlib
import random
import socket

from nbos_cluster.ports import PORT_RANGE
from nbos_cluster.records import Ports


def numbers(ports: Ports) -> dict[str, int]:
    return {name: getattr(ports, name) for name in Ports.__struct_fields__}


def free_ports(ip: str) -> Ports:
    """Five ports that nobody listens on. Random, since daemons that share a machine choose at the same time."""
    for _ in range(200):
        chosen = random.sample(range(*PORT_RANGE), 5)
        ports = Ports(**dict(zip(Ports.__struct_fields__, chosen, strict=True)))
        if bindable(ip, ports):
            return ports
    raise OSError(f"no free ports between {PORT_RANGE[0]} and {PORT_RANGE[1]} on {ip}")


def bindable(ip: str, ports: Ports) -> bool:
    with contextlib.ExitStack() as stack:
        for port in numbers(ports).values():
            sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET))
            # As ZeroMQ binds: connections of the replica before, still in TIME_WAIT, do not count.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((ip, port))
            except OSError:
                return False
    return True
