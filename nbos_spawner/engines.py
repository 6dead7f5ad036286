"""The Docker Engines of hosts, as the hub reaches them for users' servers: the admin's table, and a line to each.

It must guarantee: a TCP line is mutual TLS, or the hub does not start; an Engine that hangs holds up nobody but those
who wait for it (dockerspawner has one thread for all).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import docker
from docker.errors import APIError, DockerException
from requests.exceptions import RequestException

from nbos_cluster import keys

TIMEOUT = 30
"""Seconds that an Engine has for one call, or for the next part of a pull."""
OLDEST_API = "1.41"
TLS = ("ca", "cert", "key")
FIELDS = ("url", "address", *TLS)


class EnginesError(ValueError):
    """The table of hosts is wrong; says where, and what is allowed."""


@dataclass(frozen=True)
class HostEngine:
    """address: at which the host's containers publish their ports, and where the proxy finds them."""

    name: str
    url: str
    address: str
    tls: tuple[str, str, str] | None = None


def read_engines(table: Mapping[str, Any]) -> dict[str, HostEngine]:
    """Raises EnginesError."""
    return {name: _read(name, entry) for name, entry in table.items()}


def _read(name: str, entry: Any) -> HostEngine:
    try:
        keys.checked(name, "host")
    except ValueError as err:
        raise EnginesError(str(err)) from err
    if not isinstance(entry, Mapping) or not all(k in FIELDS and isinstance(v, str) for k, v in entry.items()):
        raise EnginesError(f"host {name}: {entry!r} must be a table of {', '.join(FIELDS)}, with text each")
    url = urlparse(entry.get("url", ""))
    if url.scheme not in ("tcp", "unix"):
        raise EnginesError(
            f"host {name}: url is {entry.get('url', '')!r}; it must begin with tcp:// or unix:// (where ssh leads to "
            "the host, let a service keep a tunnel to a socket on the hub machine)"
        )
    given = [entry[part] for part in TLS if entry.get(part)]
    if url.scheme == "tcp" and len(given) != len(TLS):
        raise EnginesError(
            f"host {name}: an Engine that is reached over TCP gives whoever reaches it the whole host; name ca, cert "
            "and key (PEM files) for mutual TLS, or use unix:// with a tunnel of ssh"
        )
    for path in given:
        if not Path(path).is_file():
            raise EnginesError(f"host {name}: there is no file {path}")
    address = entry.get("address") or (url.hostname or "127.0.0.1")
    return HostEngine(name, entry["url"], address, (given[0], given[1], given[2]) if url.scheme == "tcp" else None)


def unreachable(err: BaseException) -> bool:
    """Whether it is the line to the Engine that failed, not what was asked for."""
    if isinstance(err, APIError):
        return False
    return isinstance(err, DockerException | RequestException | OSError)


class Line:
    """To one Engine: calls one after the other, in a thread of its own."""

    def __init__(self, engine: HostEngine) -> None:
        self.engine = engine
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"docker {engine.name}")
        self._client: Any = None
        self._making = threading.Lock()

    @property
    def client(self) -> Any:
        """Docker's own; asks nothing yet."""
        with self._making:
            if self._client is None:
                self._client = _client(self.engine)
            return self._client

    async def call(self, work: Callable[[Any], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.executor, lambda: work(self.client))


def _client(engine: HostEngine) -> Any:
    tls: Any = False
    if engine.tls is not None:
        ca, cert, key = engine.tls
        tls = docker.tls.TLSConfig(client_cert=(cert, key), ca_cert=ca, verify=True)
    client = docker.APIClient(base_url=engine.url, version=OLDEST_API, timeout=TIMEOUT, tls=tls)
    # With it, REQUESTS_CA_BUNDLE in the hub's environment would count for more than the table's `ca`.
    client.trust_env = False
    return client


_lines: dict[HostEngine, Line] = {}


def line(engine: HostEngine) -> Line:
    """The one line of this hub to that Engine."""
    return _lines.setdefault(engine, Line(engine))
