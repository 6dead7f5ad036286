"""Hosts of a real `nbos up` drain, die for good and come back, under several kernels that are used meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nbos.draincommand import set_draining
from nbos_cluster.etcd import Etcd
from tests.system.cluster import Cluster, Notebook
from tests.system.hubclient import eventually
from tests.system.nbosenv import etcd_of, model, settled

pytestmark = pytest.mark.timeout(240)

KERNELS = 3
HOSTS = [f"host-{i}" for i in range(1, 6)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = ["--hosts", "5", "--at-a-time", "1", "--host-grace", "2"]
    cluster = Cluster(tmp_path_factory.mktemp("hosts") / "state", *options, hosts=5)
    cluster.start()
    yield cluster
    assert cluster.stop() == []


@pytest.fixture
async def notebooks(cluster: Cluster) -> AsyncIterator[list[Notebook]]:
    first = await Notebook.open(cluster, "ada", {"replicas": 2})
    opened = [first]
    for _ in range(KERNELS - 1):
        kernel = await first.server.start_kernel("nbos-python3")
        opened.append(Notebook(cluster, first.server, kernel, await first.server.open(kernel)))
    for notebook in opened:
        await notebook.run("total = 0")
        await settled(first.server.hub, notebook.kernel)
    yield opened
    for notebook in opened:
        await notebook.close()


async def count(notebook: Notebook, stop: asyncio.Event) -> int:
    """Cells, one after the other, until `stop`; each must succeed."""
    cells = 0
    while not stop.is_set():
        cells += 1
        await notebook.run(f"total += {cells}")
    return cells


async def watched(notebooks: list[Notebook], seen: list[int], stop: asyncio.Event) -> None:
    """How many replicas are on their way at a time."""
    while not stop.is_set():
        status = await notebooks[0].server.hub.service("GET", "nbos/api/status")
        seen.append(sum(one["move"] is not None for one in status["kernels"]))
        await asyncio.sleep(0.02)


async def placed(notebooks: list[Notebook]) -> dict[str, list[str]]:
    found = [await model(n.server.hub, n.kernel) for n in notebooks]
    return {one["kernel_id"]: [m["host"] for m in one["members"]] for one in found}


async def left(notebooks: list[Notebook], host: str) -> bool:
    return all(host not in hosts for hosts in (await placed(notebooks)).values())


async def busiest(notebooks: list[Notebook]) -> str:
    hosts = [host for placed_on in (await placed(notebooks)).values() for host in placed_on]
    return max(set(hosts), key=hosts.count)


async def test_a_draining_host_is_left_one_replica_at_a_time_while_cells_run(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    host, seen, stop = await busiest(notebooks), [], asyncio.Event()
    tasks = [asyncio.create_task(count(notebook, stop)) for notebook in notebooks]
    watching = asyncio.create_task(watched(notebooks, seen, stop))
    async with Etcd(*etcd_of(cluster.state_dir)) as etcd:
        await set_draining(etcd, host, True)
        await eventually(lambda: left(notebooks, host), f"host {host} is left", 90, every=0.2)
        stop.set()
        cells = await asyncio.gather(*tasks)
        await watching
        await set_draining(etcd, host, False)
    assert max(seen) == 1
    for notebook, n in zip(notebooks, cells, strict=True):
        assert await notebook.run("total") == str(n * (n + 1) // 2)
    assert all(len(set(hosts)) == 2 for hosts in (await placed(notebooks)).values())


async def test_draining_that_is_taken_back_leaves_replicas_where_they_are(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    host, before = await busiest(notebooks), await placed(notebooks)
    async with Etcd(*etcd_of(cluster.state_dir)) as etcd:
        await set_draining(etcd, host, True)

        async def begun() -> bool:
            return any([(await model(n.server.hub, n.kernel))["move"] is not None for n in notebooks])

        await eventually(begun, "a replica is on its way", 20, every=0.01)
        await set_draining(etcd, host, False)

    async def still() -> bool:
        return not await begun()

    await eventually(still, "no replica is on its way", 40)
    after = await placed(notebooks)
    assert (
        sum(sorted(before[k]) != sorted(after[k]) for k in before) <= 1
    )  # the one that was past its last cell, if any
    assert sum(host in hosts for hosts in after.values()) >= 1


@pytest.mark.parametrize("all_of_it", [True, False], ids=["with its replicas", "its daemon alone"])
async def test_a_host_killed_for_good_is_replaced_elsewhere_and_clears_when_it_is_back(
    cluster: Cluster, notebooks: list[Notebook], all_of_it: bool
) -> None:
    """kill -9 of the daemon, and of its replicas at the same moment; its place is held so that it stays away. Replicas
    that live on without their daemon are ended by the next one."""
    host = await busiest(notebooks)
    stop = asyncio.Event()
    hurt = [kernel for kernel, hosts in (await placed(notebooks)).items() if host in hosts]
    with dead(cluster, host, all_of_it):
        tasks = [asyncio.create_task(count(notebook, stop)) for notebook in notebooks]
        await eventually(lambda: left(notebooks, host), f"the replicas of {host} are placed elsewhere", 60, every=0.1)
        for notebook in notebooks:
            await settled_while_used(notebook)
        assert bool(replicas_of(cluster, host)) == (not all_of_it)
        stop.set()
        cells = await asyncio.gather(*tasks)
    for notebook, n in zip(notebooks, cells, strict=True):
        hosts = (await placed([notebook]))[notebook.kernel]
        assert len(set(hosts)) == 2
        assert await notebook.run("total") == str(n * (n + 1) // 2)
    assert hurt
    await eventually(lambda: back(cluster, host), f"{host} is back", 60)
    await eventually(lambda: none_below(cluster, host), f"{host} runs nothing any more", 30)


@contextlib.contextmanager
def dead(cluster: Cluster, host: str, all_of_it: bool) -> Iterator[None]:
    """The host's daemon (and its replicas) are killed, and a daemon that is started again finds no place."""
    daemon = psutil.Process(cluster.daemon_pid(host))
    folder = Path(cluster_run_dir(cluster, host))
    family = replicas_of(cluster, host) if all_of_it else []
    away = folder.with_name(folder.name + ".away")
    os.kill(daemon.pid, signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    folder.rename(away)
    folder.write_text("this host is dead")  # a daemon that is started again ends at once
    try:
        yield
    finally:
        folder.unlink()
        away.rename(folder)


def cluster_run_dir(cluster: Cluster, host: str) -> str:
    from nbos.state import StateDir

    return str(StateDir.at(cluster.state_dir).info()["hosts"][host]["run_dir"])


def replicas_of(cluster: Cluster, host: str) -> list[psutil.Process]:
    folder = cluster_run_dir(cluster, host)
    return cluster.processes(lambda line: "nbos_kernel" in line and folder in line)


async def settled_while_used(notebook: Notebook) -> None:
    async def ready() -> bool:
        return all(m["state"] == "ready" for m in (await model(notebook.server.hub, notebook.kernel))["members"])

    await eventually(ready, f"all replicas of {notebook.kernel} are ready", 60)


async def back(cluster: Cluster, host: str) -> bool:
    status: dict[str, Any] = await asyncio.to_thread(cluster.status)
    return host in [found["name"] for found in status["hosts"]]


async def none_below(cluster: Cluster, host: str) -> bool:
    return not replicas_of(cluster, host)
