"""Three users, two GPUs, a whole cluster: cells ask for slices, borrow, wait, are interrupted, crash with a grant.

Nothing leaks, no TPC is held twice at any moment that anybody can see, and the accounts add up to the second.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.channels import Cell, Result
from tests.system.cluster import Cluster, Notebook
from tests.system.hubclient import eventually
from tests.system.test_sharing import nbos_accounts

pytestmark = pytest.mark.timeout(240)

TPCS = 8
SHARING = {"shares": {"users": {"ann": {"tpcs": 8, "memory": "4G"}, "bob": {"tpcs": 4, "memory": "4G"}}}}
"""Of two GPUs of 8 TPCs: one GPU's worth is ann's, half of the other bob's; eve has nothing of her own."""

STEPS = """%%gpu tpcs={tpcs} mem=2G {more}
from nbos_kernel import simgpu
import nbos_kernel, os
print('begun', nbos_kernel.grant().tpcs, flush=True)
for _ in simgpu.steps(100000, work=0.08):
    if os.path.exists({end!r}):
        break
print('ended', nbos_kernel.grant().tpcs)
get_ipython().run_line_magic('nbos', 'gpu')"""


class Steps:
    """A cell that computes until it is told to end."""

    def __init__(self, cell: Cell, end: Path) -> None:
        self.cell, self._end = cell, end

    @classmethod
    async def begin(cls, notebook: Notebook, folder: Path, tpcs: int, more: str = "") -> Steps:
        end = folder / f"end-{time.monotonic_ns()}"
        return cls(await notebook.channels.submit(STEPS.format(tpcs=tpcs, more=more, end=str(end))), end)

    async def ends(self) -> Result:
        self._end.touch()
        result = await self.cell.result(40)
        assert result.status == "ok", result.error
        return result


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("lending")
    (folder / "sharing.json").write_text(json.dumps(SHARING))
    options = ["--hosts", "1", "--gpus", "2", "--tpcs", str(TPCS), "--gpu-memory", "8G"]
    cluster = Cluster(folder / "state", *options, "--sharing", str(folder / "sharing.json"), hosts=1)
    cluster.start()
    yield cluster
    assert cluster.stop() == []


@pytest.fixture
async def people(cluster: Cluster) -> AsyncIterator[dict[str, Notebook]]:
    opened = {user: await Notebook.open(cluster, user, {"replicas": 1}) for user in ("ann", "bob", "eve")}
    for notebook in opened.values():
        await notebook.run("import time")
        await notebook.settled()
    yield opened
    for notebook in opened.values():
        await notebook.close()


def grants(cluster: Cluster) -> list[dict[str, Any]]:
    return [grant for host in cluster.status()["hosts"] for grant in host["grants"]]


async def test_cells_ask_borrow_wait_are_interrupted_and_crash_and_nothing_leaks(
    cluster: Cluster, people: dict[str, Notebook], tmp_path: Path
) -> None:
    ann, bob, eve = people["ann"], people["bob"], people["eve"]
    # eve owns nothing: she keeps what is owed to nobody, 4 of 8, and has bob's on loan.
    hers = await Steps.begin(eve, tmp_path, 4, "borrow=max")
    await hers.cell.text("begun")
    await holds(cluster, "eve", TPCS)
    # bob comes: within his quota, so he has it as soon as eve's step is over.
    his = await Steps.begin(bob, tmp_path, 4)
    await his.cell.text("begun 4", 20)
    await holds(cluster, "eve", 4)
    # ann crashes while she holds all that is hers.
    crash = "%%gpu tpcs=8 mem=2G\nimport os, time; print('begun', flush=True); time.sleep(1.5); os._exit(3)"
    third = await ann.channels.submit(crash)
    await third.text("begun", 20)
    assert (await third.result(40)).status == "error"
    await his.ends()
    await holds(cluster, "eve", TPCS)
    # A cell that does not borrow waits for more than its owner has, is told why, and is interrupted there.
    waits = await Steps.begin(bob, tmp_path, 8, "borrow=no")
    await waits.cell.text("owed to others' quotas and only lent", 20)
    await bob.server.interrupt(bob.kernel)
    assert (await waits.cell.result(20)).status == "error"
    # ann's is there for her, in the process that was made anew; this cell is interrupted while it computes.
    again = await Steps.begin(ann, tmp_path, 8)
    await again.cell.text("begun 8", 40)
    await ann.server.interrupt(ann.kernel)
    assert (await again.cell.result(20)).status == "error"
    done = await hers.ends()
    for said in ("of them on loan: others' idle quota", "TPCs given back, within", "more TPCs lent by others"):
        assert said in done.stdout
    await no_grants(cluster)
    await the_accounts_add_up(cluster, done.seconds)


async def the_accounts_add_up(cluster: Cluster, eves: float) -> None:
    """eves: how long her cell took, as her browser saw it."""

    async def told(by: str) -> dict[str, dict[str, float]] | None:
        rows = await asyncio.to_thread(nbos_accounts, cluster, "--by", by)
        found = {row[by]: {k: float(row[k]) for k in ("cells", "seconds", "tpc_seconds")} for row in rows}
        return found if sum(row["cells"] for row in found.values()) == 4 else None

    users = await eventually(lambda: told("user"), "four cells are accounted", 20)
    ann, bob, eve = users["ann"], users["bob"], users["eve"]
    assert abs(eve["seconds"] - eves) < 1, "to the second"
    assert abs(ann["tpc_seconds"] - 8 * ann["seconds"]) < 0.01, "what is hers she kept"
    assert abs(bob["tpc_seconds"] - 4 * bob["seconds"]) < 0.01, "and he"
    assert ann["seconds"] + 0.05 >= 1.5
    # One GPU was eve's and bob's: at every moment all of it was held, by one of them or the other.
    assert abs(eve["tpc_seconds"] + bob["tpc_seconds"] - TPCS * eve["seconds"]) < TPCS / 2
    kernels = await eventually(lambda: told("kernel"), "by kernel, too", 20)
    assert abs(sum(k["tpc_seconds"] for k in kernels.values()) - sum(u["tpc_seconds"] for u in users.values())) < 0.01


async def test_a_daemon_that_is_killed_while_tpcs_are_on_loan_goes_on_with_them(
    cluster: Cluster, people: dict[str, Notebook], tmp_path: Path
) -> None:
    hers = await Steps.begin(people["eve"], tmp_path, 4, "borrow=max")
    await hers.cell.text("begun")
    await holds(cluster, "eve", TPCS)
    os.kill(cluster.daemon_pid(cluster.status()["hosts"][0]["name"]), signal.SIGKILL)
    his = await Steps.begin(people["bob"], tmp_path, 4)
    await his.cell.text("begun 4", 30)
    await his.ends()
    await holds(cluster, "eve", TPCS)
    await hers.ends()
    await no_grants(cluster)


TOUCHES = """from nbos_kernel import simgpu
import nbos_kernel, os
for step in simgpu.steps(100000, work=0.08):
    if step == 0:
        print('begun', nbos_kernel.grant().tpcs, flush=True)
    if os.path.exists({end!r}):
        break
print('ended', nbos_kernel.grant().tpcs)"""


async def test_a_cell_that_touches_a_slice_has_the_loan_and_gives_it_back_at_a_step(
    cluster: Cluster, people: dict[str, Notebook], tmp_path: Path
) -> None:
    fay, end = await Notebook.open(cluster, "fay", {"replicas": 1, "tpcs": TPCS, "memory": "2G"}), tmp_path / "fays"
    cell = await fay.channels.submit(TOUCHES.format(end=str(end)))
    await cell.text(f"begun {TPCS}", 40)
    his = await Steps.begin(people["bob"], tmp_path, 4)
    await his.cell.text("begun 4", 20)
    await holds(cluster, "fay", 4)
    end.touch()
    assert "ended 4" in (await cell.result(20)).stdout
    await his.ends()
    await no_grants(cluster)
    await fay.close()


async def holds(cluster: Cluster, user: str, tpcs: int) -> None:
    async def there() -> bool:
        found = [g for g in await asyncio.to_thread(grants, cluster) if g["owner"] == user]
        return [len(share["tpcs"]) for grant in found for share in grant["shares"]] == [tpcs]

    await eventually(there, f"{user} holds {tpcs} TPCs", 15)


async def no_grants(cluster: Cluster) -> None:
    async def none_left() -> bool:
        return not await asyncio.to_thread(grants, cluster)

    await eventually(none_left, "every grant is given back", 15)
