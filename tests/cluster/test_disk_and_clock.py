"""A disk that is full and a clock that is wrong by an hour, under a notebook that is used: what its user sees, and that
nothing is lost. The histories are checked as in test_faults.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from tests.cluster.history import History
from tests.cluster.machines import Machines
from tests.cluster.test_faults import LONG, lead, some_cells
from tests.system.hubclient import eventually

pytestmark = pytest.mark.timeout(300)


async def test_the_disk_of_a_host_is_full(machines: Machines, history: History) -> None:
    """Cells run on, those with a GPU on another host; a daemon that is killed meanwhile finds its replicas again."""
    host = await lead(history)
    async with machines.full(host):
        await some_cells(history)
        # What an earlier test's replicas left there may have been removed just now.
        await machines.fill(host)
        result = await history.run("%%gpu tpcs=8", timeout=60)
        assert (result.status, result.stderr) == ("ok", "")
        assert await lead(history) != host
        machines.kill(host, "gpu_daemon")
        await some_cells(history)
    await machines.whole()
    await some_cells(history)
    await history.notebook.settled(60)


async def test_a_full_blob_store_costs_the_value_that_finds_no_room_until_there_is_some(
    machines: Machines, history: History
) -> None:
    notebook = history.notebook
    await notebook.run("big = bytes(1 << 20)")

    async def told() -> bool:
        return "is full" in (await notebook.model())["lost"].get("big", "")

    async with machines.full("blobs"):
        await notebook.run("import os; big = os.urandom(1 << 20); small = big[:8]")
        await eventually(told, "its user sees what is not replicated, and why", 30)
        await some_cells(history)
    await notebook.run("None")

    async def kept() -> bool:
        return "big" not in (await notebook.model())["lost"]

    await eventually(kept, "it is replicated once there is room", 60)
    async with machines.dead(await lead(history)):
        assert await notebook.run("big[:8] == small, len(big)", 60) == "(True, 1048576)"
        await some_cells(history)


async def seconds_used(machines: Machines) -> float:
    """In hours that are to come, too: a host puts its use where its clock says."""
    until = datetime.now(UTC).date() + timedelta(days=2)
    rows = (await machines.hub.service("GET", f"nbos/api/accounts?until={until}"))["rows"]
    return sum(float(row["seconds"]) for row in rows)


@pytest.mark.parametrize("wrong", [3600, -3600], ids=["ahead", "behind"])
async def test_the_clock_of_a_host_is_wrong_by_an_hour(machines: Machines, history: History, wrong: int) -> None:
    """During a cell, and still wrong when its daemon has to make its connections anew and when another host dies."""
    used, began = await seconds_used(machines), time.monotonic()
    cell = await history.submit("%%gpu tpcs=8\n" + LONG)
    await cell.cell.text("begun")
    host = await lead(history)
    async with machines.clock_off(host, wrong):
        result = await cell.done()
        assert (result.status, result.stderr) == ("ok", "")
        assert f"this host's clock was set by {wrong:+d} s" in machines.said(host)
        machines.kill(host, "gpu_daemon")
        await some_cells(history)
        await machines.whole()
        await history.notebook.settled(60)
        async with machines.dead(await lead(history)):
            await some_cells(history)
            assert (await history.run("%%gpu tpcs=8", timeout=60)).status == "ok"
        await machines.whole()
    await machines.whole()
    await some_cells(history)

    async def accounted() -> bool:
        return await seconds_used(machines) - used > 4

    await eventually(accounted, "the cell's use is accounted", 20)
    assert await seconds_used(machines) - used < time.monotonic() - began
