"""Fixtures for tests against real processes; what they hold lives in modules of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .etcdserver import EtcdServer
from .guarded import Guarded


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[EtcdServer]:
    """A running etcd without TLS."""
    server = EtcdServer(tmp_path)
    server.start()
    try:
        await server.ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def tls_etcd(tmp_path: Path) -> AsyncIterator[EtcdServer]:
    """A running etcd that wants a client certificate."""
    server = EtcdServer(tmp_path, tls=True)
    server.start()
    try:
        await server.ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def three_etcds(tmp_path: Path) -> AsyncIterator[list[EtcdServer]]:
    """A running cluster of three members."""
    servers = []
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        servers.append(EtcdServer(tmp_path / name, name=name))
    for server in servers:
        server.cluster = servers
        server.start()
    try:
        for server in servers:
            await server.ready()
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
async def guarded(tls_etcd: EtcdServer) -> Guarded:
    """The same with access control on, the roles of hosts a and b, and a kernel."""
    found = Guarded(tls_etcd)
    await found.set_up()
    return found
