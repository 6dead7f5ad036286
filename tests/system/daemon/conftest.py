"""Fixtures: daemons with an etcd of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbos_cluster.etcd import Etcd
from tests.system.daemon.site import Host
from tests.system.etcdserver import EtcdServer

MakeHost = Callable[..., Host]


@pytest.fixture
def host(tmp_path: Path, etcd: EtcdServer) -> Iterator[MakeHost]:
    hosts: list[Host] = []

    def make(name: str = "a", **config: Any) -> Host:
        hosts.append(Host(tmp_path, name, etcd.endpoint, **config))
        return hosts[-1].start()

    yield make
    for one in hosts:
        one.end()
    for one in hosts:
        assert "Traceback" not in one.log.read_text()


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Etcd]:
    async with Etcd([etcd.endpoint]) as opened:
        yield opened
