"""Fixtures: one Engine and one kernel image for all tests here; daemons whose replicas run in Docker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbos_cluster.etcd import Etcd
from tests.system.containers.engine import build_image, running_engine
from tests.system.containers.host import DockerHost
from tests.system.containers.registry import Registry
from tests.system.etcdserver import EtcdServer

MakeHost = Callable[..., DockerHost]


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    yield from running_engine()


@pytest.fixture(scope="session")
def image(engine: None) -> None:
    build_image()


@pytest.fixture
def registry(engine: None) -> Iterator[Registry]:
    """Ask for it before `host`: its image can be removed only after the daemon's containers."""
    registry = Registry(40_000_000)
    yield registry
    registry.close()


@pytest.fixture
def host(tmp_path: Path, etcd: EtcdServer, image: None) -> Iterator[MakeHost]:
    hosts: list[DockerHost] = []

    def make(name: str = "a", **options: Any) -> DockerHost:
        hosts.append(DockerHost(tmp_path, name, etcd.endpoint, options))
        hosts[-1].start()
        return hosts[-1]

    yield make
    for one in hosts:
        one.end()
    for one in hosts:
        assert "Traceback" not in one.log.read_text()


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Etcd]:
    async with Etcd([etcd.endpoint]) as opened:
        yield opened
