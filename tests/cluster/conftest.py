"""One compose cluster for the session; skipped, with the reason, where none is asked for or can run.

$NBOS_TEST_CLUSTER=up: one is brought up, and down at the end. $NBOS_TEST_CLUSTER=project:port:network:tag: of a cluster
that `docker/cluster up` started, to be used as it is.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.cluster.history import History
from tests.cluster.machines import Machines
from tests.system.cluster import KERNEL, Notebook
from tests.system.containers.engine import docker, running_engine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test's time is also that in which images are built and the cluster comes up."""
    first = next((item for item in items if "_machines" in getattr(item, "fixturenames", ())), None)
    if first is not None:
        first.add_marker(pytest.mark.timeout(1500), append=False)


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    yield from running_engine()


@pytest.fixture(scope="session")
def _machines(engine: None) -> Iterator[Machines]:
    given = os.environ.get("NBOS_TEST_CLUSTER", "")
    if not given:
        pytest.skip("a compose cluster takes its time: set NBOS_TEST_CLUSTER=up to have one brought up")
    if not docker("compose", "version", check=False):
        pytest.skip("Docker's compose plugin is not installed")
    if given != "up":
        project, port, network, tag = given.split(":")
        machines = Machines(project, int(port), network, tag)
        yield machines
        machines.forget()
        return
    machines = Machines()
    try:
        machines.up()
        yield machines
    finally:
        machines.down()
        machines.forget()


@pytest.fixture
async def machines(_machines: Machines) -> Machines:
    """Whole before the test."""
    await _machines.whole()
    return _machines


@pytest.fixture(scope="session")
def _kernels(_machines: Machines) -> Iterator[list[str]]:
    """The kernel that the next test takes up from the last one, which left it whole: a new one takes seconds."""
    kernels: list[str] = []
    yield kernels
    if kernels:
        asyncio.run(_end(_machines, kernels.pop()))


async def _end(machines: Machines, kernel: str) -> None:
    await (await machines.hub.start_server("ada")).delete_kernel(kernel)


@pytest.fixture
async def notebook(machines: Machines, _kernels: list[str]) -> AsyncIterator[Notebook]:
    """With three replicas, settled."""
    server = await machines.hub.start_server("ada")
    kernel = _kernels.pop() if _kernels else await server.start_kernel(KERNEL)
    notebook = Notebook(machines, server, kernel, await server.open(kernel))
    await notebook.settled(60)
    yield notebook
    await notebook.channels.close()


@pytest.fixture
async def history(machines: Machines, notebook: Notebook, _kernels: list[str]) -> AsyncIterator[History]:
    """Of one notebook; checked against the log after the test."""
    history = await History(notebook).begin()
    await history.run()
    yield history
    await machines.whole()
    await history.check(machines.etcd, machines.admin())
    _kernels.append(notebook.kernel)
