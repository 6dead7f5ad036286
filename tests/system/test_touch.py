"""A cell that does not say what it needs begins at once, and asks for a GPU where it first uses one."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.cluster import Cluster, Notebook
from tests.system.hubclient import eventually

pytestmark = pytest.mark.timeout(240)

TRAIN = "%%gpu 1\nprint('begun', flush=True)\nimport time; time.sleep(60)"
TOUCH = "print('before', flush=True)\nfrom nbos_kernel import simgpu, grant\nsimgpu.run(0.1)\nprint(grant().tpcs)"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One host, one simulated device of 66 TPCs."""
    options = ["--hosts", "1", "--gpus", "1", "--tpcs", "66", "--gpu-memory", "80G"]
    cluster = Cluster(tmp_path_factory.mktemp("touch") / "state", *options, hosts=1)
    cluster.start()
    yield cluster
    assert cluster.stop() == []


@pytest.fixture
async def notebooks(cluster: Cluster) -> AsyncIterator[list[Notebook]]:
    """Two kernels of one replica each, whose cells get a whole GPU by default."""
    options = {"replicas": 1, "gpus": 1}
    opened = [await Notebook.open(cluster, "ada", options) for _ in range(2)]
    for notebook in opened:
        await notebook.run("1 + 1")
    yield opened
    for notebook in opened:
        await notebook.close()


async def grants(cluster: Cluster) -> list[dict[str, Any]]:
    return [grant for host in (await asyncio.to_thread(cluster.status))["hosts"] for grant in host["grants"]]


async def no_grants(cluster: Cluster) -> None:
    async def none_left() -> bool:
        return not await grants(cluster)

    await eventually(none_left, "every grant is given back", 15)


async def train(notebook: Notebook) -> Any:
    cell = await notebook.channels.submit(TRAIN)
    await cell.text("begun")
    return cell


async def stop(notebook: Notebook, cell: Any) -> None:
    await notebook.server.interrupt(notebook.kernel)
    await cell.result(15)


async def test_a_cell_that_uses_no_gpu_runs_while_another_trains_and_one_that_does_waits_where_it_touches(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    trains, works = notebooks
    training = await train(trains)
    assert await works.run("import json, csv, sqlite3\nlen(dir(json)) > 3", timeout=10) == "True"
    assert "it gets one when it first uses one" in await works.run("%nbos gpu", timeout=10)
    touches = await works.channels.submit(TOUCH)
    await touches.text("before")
    await touches.text("position 1 of 1", 10)
    assert touches.reply is None
    await stop(trains, training)
    result = await touches.result(30)
    assert result.stdout == "before\n66\n"
    shown = [m.content for m in result.outputs if m.type in ("display_data", "update_display_data")]
    assert len({content["transient"]["display_id"] for content in shown}) == 1
    assert re.match(
        r"NBOS: waited [\d.]+ s( for a GPU)?, got 1 GPU \(Simulated \S+\) on replica 0", shown[-1]["data"]["text/plain"]
    )
    await no_grants(cluster)
    assert re.search(r"\[\d+\]: 1 GPU, 80.0 GiB of Simulated", await works.run("%nbos gpu"))
    assert "66" in await works.run("%%gpu 1\nprint(grant().tpcs)"), "what the line says is asked for before it starts"


CAUGHT = """from nbos_kernel import simgpu
import os, time
try:
    simgpu.run(1)
except KeyboardInterrupt:
    print('caught', flush=True)
    while not os.path.exists({end!r}):
        time.sleep(0.02)"""


async def test_an_interrupt_leaves_the_queue_and_raises_where_the_cell_touched(
    cluster: Cluster, notebooks: list[Notebook], tmp_path: Path
) -> None:
    trains, works = notebooks
    training, end = await train(trains), tmp_path / "end"
    cell = await works.channels.submit(CAUGHT.format(end=str(end)))
    await cell.text("position 1 of 1", 10)

    async def wait(count: int) -> bool:
        return len((await asyncio.to_thread(cluster.status))["queues"]) == count

    await eventually(lambda: wait(1), "it stands in the queue", 10)
    await works.server.interrupt(works.kernel)
    await cell.text("left the queue after", 10)
    await eventually(lambda: wait(0), "the queue is empty, though the cell goes on", 10)
    assert cell.reply is None
    end.touch()
    result = await cell.result(15)
    assert (result.status, result.stdout) == ("ok", "caught\n")
    cell = await works.channels.submit("simgpu.run(1)")
    await cell.text("position 1 of 1", 10)
    await works.server.interrupt(works.kernel)
    assert (await cell.result(15)).error.startswith("KeyboardInterrupt")
    await stop(trains, training)
    await no_grants(cluster)


async def test_names_with_device_data_and_texts_that_touched_before_ask_before_they_start(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    trains, works = notebooks
    await works.run("from nbos_kernel import simgpu\nweights = simgpu.allocate('1G')\ndef size(): return weights.size")
    await works.run("simgpu.run(0.01)")
    training = await train(trains)
    for code in ("print('ran', size())", "print('ran', weights.size)", "simgpu.run(0.01)"):
        cell = await works.channels.submit(code)
        await cell.text("position 1 of 1", 10)
        await works.server.interrupt(works.kernel)
        result = await cell.result(15)
        assert result.error == "KeyboardInterrupt: the cell left the queue", "it had not begun"
        assert result.stdout == ""
    assert await works.run("print('ran', simgpu)", timeout=10)
    await stop(trains, training)


@pytest.mark.parametrize("waits", [True, False])
async def test_a_replica_killed_where_its_cell_touched_leaves_neither_a_grant_nor_a_place(
    cluster: Cluster, notebooks: list[Notebook], waits: bool
) -> None:
    trains, works = notebooks
    training = await train(trains) if waits else None
    cell = await works.channels.submit(
        "from nbos_kernel import simgpu\nsimgpu.run(0.01)\nprint('got', flush=True)\nsimgpu.run(9e3)"
    )
    await cell.text("position 1 of 1" if waits else "got", 15)
    os.kill((await works.executor()).pid, signal.SIGKILL)
    result = await cell.result(40)
    assert result.status == "error"

    async def nothing_left() -> bool:
        status = await asyncio.to_thread(cluster.status)
        held = [grant["kernel"] for host in status["hosts"] for grant in host["grants"]]
        return works.kernel not in held and not status["queues"]

    await eventually(nothing_left, "no grant and no place in the queue is left", 15)
    if training is not None:
        await stop(trains, training)
    assert await works.run("%%gpu 1\nimport nbos_kernel; print(nbos_kernel.grant().tpcs)") == "66\n"
