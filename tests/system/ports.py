"""Ports for the servers of tests.

Below Linux's ephemeral ports: what is bound there and let go of may be some connection's own port by the time that the
server starts, and two files of tests run at a time. Each worker of pytest-xdist has a range of its own, below the one
that daemons and routers choose from.
"""

from __future__ import annotations

import os
import random
import re

from nbos.ports import is_free

FIRST, EACH, WORKERS = 10000, 600, 8


def _ports() -> list[int]:
    number = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or WORKERS - 1) % WORKERS
    begin = FIRST + number * EACH
    ports = list(range(begin, begin + EACH))
    random.Random(os.getpid()).shuffle(ports)  # another run that went before left connections in TIME_WAIT
    return ports


_left = _ports()


def free_ports(count: int = 1, ip: str = "127.0.0.1") -> list[int]:
    """So many that nobody listens on; each is given again only after all others."""
    chosen: list[int] = []
    for _ in range(EACH):
        if len(chosen) == count:
            return chosen
        port = _left.pop(0)
        _left.append(port)
        if is_free(ip, port):
            chosen.append(port)
    raise OSError(f"fewer than {count} of the ports {min(_left)} to {max(_left)} are free")


def free_port() -> int:
    return free_ports()[0]
