"""Ports on this machine: which are free, who has one, and a choice that is kept between runs."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil

from nbos_cluster.ports import PORT_RANGE

from .state import read_json, write_json


class PortInUse(RuntimeError):
    """A port that was asked for is taken; names it, who may have it, and the way out."""


def is_free(ip: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """Who listens on `port`, as far as this user may know; for a message."""
    try:
        listening = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        listening = []
    for connection in listening:
        if connection.laddr and connection.laddr.port == port and connection.pid:
            try:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
            except psutil.NoSuchProcess:
                break
    return "another user's process"


def check_public(ip: str, port: int) -> None:
    """Raise PortInUse unless `port` can be listened on."""
    if not is_free(ip, port):
        raise PortInUse(
            f"port {port} on {ip} is in use by {holder(port)}; end that, or choose another one: "
            f"nbos up --port {port + 10}"
        )


def _choose(ip: str, taken: Collection[int]) -> int:
    for port in random.sample(range(*PORT_RANGE), 200):
        if port not in taken and is_free(ip, port):
            return port
    raise PortInUse(
        f"no free port was found between {PORT_RANGE[0]} and {PORT_RANGE[1]} on {ip}; end what listens there"
    )


def keep_ports(file: Path, names: Iterable[str], ip: str = "127.0.0.1") -> dict[str, int]:
    """A port for each name: the one `file` remembers while it is free, else a new one, remembered."""
    kept = {name: port for name, port in read_json(file).items() if isinstance(port, int)}
    chosen: dict[str, int] = {}
    for name in names:
        port = kept.get(name, 0)
        if not port or port in chosen.values() or not is_free(ip, port):
            port = _choose(ip, chosen.values())
        chosen[name] = port
    write_json(file, chosen)
    return chosen
