"""GPUs are granted per execution: what a cell holds, who waits and why, that a grant ends however its cell ends, and
what `nbos gpus` shows of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.system.cluster import Cluster, Notebook
from tests.system.hubclient import eventually
from tests.system.nbosenv import environment

pytestmark = pytest.mark.timeout(240)

HOLD = "print('begun', flush=True)\nimport time; time.sleep({seconds})"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One simulated device of 66 TPCs on each of three hosts."""
    options = ["--gpus", "1", "--tpcs", "66", "--gpu-memory", "80G", "--gpu-model", "Simulated H200"]
    cluster = Cluster(tmp_path_factory.mktemp("gpus") / "state", *options)
    cluster.start()
    yield cluster
    assert cluster.stop() == []


@pytest.fixture
async def notebooks(cluster: Cluster) -> AsyncIterator[list[Notebook]]:
    """Four kernels: one more than there are devices."""
    opened = [await Notebook.open(cluster, "ada") for _ in range(4)]
    for notebook in opened:
        await notebook.run("import nbos_kernel")
        await notebook.settled()
    yield opened
    for notebook in opened:
        await notebook.close()


def grants(cluster: Cluster) -> list[dict[str, Any]]:
    return [grant for host in cluster.status()["hosts"] for grant in host["grants"]]


async def no_grants(cluster: Cluster) -> None:
    async def none_left() -> bool:
        return not await asyncio.to_thread(grants, cluster)

    await eventually(none_left, "every grant is given back", 15)


async def test_a_cell_holds_what_it_asked_for_and_only_while_it_runs(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    notebook = notebooks[0]
    assert await notebook.run("print(nbos_kernel.grant())") == "None\n"
    asked = "%%gpu tpcs=16 mem=20G\ng = nbos_kernel.grant(); print(g.tpcs, g.memory)"
    assert await notebook.run(asked) == f"16 {20 << 30}\n"
    whole = await notebook.run("%%gpu 1\nprint(nbos_kernel.grant().tpcs)")
    assert whole == "66\n"
    assert await notebook.run("print(nbos_kernel.grant())") == "None\n"
    await no_grants(cluster)


async def test_metadata_asks_as_the_magic_does(notebooks: list[Notebook]) -> None:
    metadata = {"nbos": {"resources": {"tpcs": 8}}}
    assert await notebooks[0].run("print(nbos_kernel.grant().tpcs)", metadata=metadata) == "8\n"


async def test_more_than_a_host_has_is_refused_with_the_limit(notebooks: list[Notebook]) -> None:
    result = await notebooks[0].channels.execute("%%gpu tpcs=72\n1")
    assert result.status == "error"
    assert "72" in result.error
    assert "66" in result.error


async def test_a_model_that_no_host_has_is_refused_with_those_there_are(notebooks: list[Notebook]) -> None:
    result = await notebooks[0].channels.execute("%%gpu model=A100\n1")
    assert result.status == "error"
    for host in ("host-1", "host-2", "host-3"):
        assert f"{host} has Simulated H200" in result.error
    assert await notebooks[0].run("%%gpu model=h200\nprint(nbos_kernel.grant().tpcs)") == "66\n"


@pytest.mark.parametrize("line", ["%%gpu many", "%%gpu tpcs=0", "%%gpu 1 mem=lots", "%%gpu -1"])
async def test_a_malformed_request_names_what_is_wrong(notebooks: list[Notebook], line: str) -> None:
    result = await notebooks[0].channels.execute(f"{line}\n1")
    assert result.status == "error"
    assert line.split()[-1].split("=")[-1] in result.error
    assert await notebooks[0].run("1 + 1") == "2"


async def test_slices_of_one_device_are_disjoint(cluster: Cluster, notebooks: list[Notebook]) -> None:
    code = "%%gpu tpcs=22 mem=10G\n" + HOLD.format(seconds=3)
    cells = [await notebook.channels.submit(code) for notebook in notebooks]
    for cell in cells:
        await cell.text("begun")
    held = await asyncio.to_thread(grants, cluster)
    assert len(held) == 4
    for uuid in {share["uuid"] for grant in held for share in grant["shares"]}:
        tpcs = [t for grant in held for share in grant["shares"] if share["uuid"] == uuid for t in share["tpcs"]]
        assert len(tpcs) == len(set(tpcs))
    for cell in cells:
        assert (await cell.result(30)).status == "ok"
    await no_grants(cluster)


async def test_a_cell_without_room_waits_shows_why_and_runs_when_there_is_some(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    holders = [await n.channels.submit("%%gpu 1\n" + HOLD.format(seconds=6)) for n in notebooks[:3]]
    for cell in holders:
        await cell.text("begun")
    waiting = await notebooks[3].channels.submit("%%gpu 1\nimport time; time.sleep(0.5); print('ran')")
    await waiting.text("position", 10)
    assert waiting.reply is None
    result = await waiting.result(60)
    assert result.status == "ok"
    assert "ran" in result.stdout
    shown = [m.content for m in result.outputs if m.type in ("display_data", "update_display_data")]
    assert len({content["transient"]["display_id"] for content in shown}) == 1, "one display, from the wait to its end"
    last = shown[-1]["data"]["text/plain"]
    line = re.fullmatch(
        r"NBOS: waited ([\d.]+) s for a GPU, got 1 GPU \(Simulated H\d+\) on replica \d on host .*, "
        r"held it for ([\d.]+) s, (\d+) TPC·s",
        last,
    )
    assert line, last
    assert 2 < float(line[1]) < 8
    assert 0.5 <= float(line[2]) < 5
    assert abs(float(line[3]) - 66 * float(line[2])) < 5
    for cell in holders:
        assert "for a GPU" not in str((finished := await cell.result(30)).outputs), "who did not wait is told nothing"
        assert finished.status == "ok"
    await no_grants(cluster)


async def test_the_notebook_says_what_its_cells_got_also_after_a_failover(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    notebook = notebooks[0]
    await notebook.run("%%gpu tpcs=16 mem=20G\nimport time; time.sleep(0.5)")
    mine = await notebook.run("%%gpu tpcs=8\n%nbos gpu")
    assert "a cell of this kernel may use: 4 GPUs or 132 TPCs" in mine
    assert "this cell holds: 8 TPCs" in mine
    assert "58 of 66 TPCs" in mine
    row = re.search(
        r"\[\d+\]: 16 TPCs, 20.0 GiB of Simulated H\d+ on \S+; waited 0.0 s, held 0.[5-9] s, \d+ TPC·s", mine
    )
    assert row, mine
    before = await notebook.executor()
    await notebook.settled()
    os.kill(before.pid, signal.SIGKILL)
    after = await notebook.run("%nbos gpu")
    assert (await notebook.executor()).index != before.index
    assert row[0] in after
    assert re.search(r"\]: 8 TPCs", after)
    assert "this cell holds no GPU" in after
    await notebook.settled()


async def test_a_cpu_cell_never_waits_for_a_gpu(notebooks: list[Notebook]) -> None:
    holders = [await n.channels.submit("%%gpu 1\n" + HOLD.format(seconds=4)) for n in notebooks[:3]]
    for cell in holders:
        await cell.text("begun")
    assert await notebooks[3].run("6 * 7", timeout=3) == "42"
    assert [cell.reply for cell in holders] == [None, None, None]
    for cell in holders:
        await cell.result(30)


async def test_interrupt_leaves_the_queue(cluster: Cluster, notebooks: list[Notebook]) -> None:
    holders = [await n.channels.submit("%%gpu 1\n" + HOLD.format(seconds=30)) for n in notebooks[:3]]
    for cell in holders:
        await cell.text("begun")
    waiting = await notebooks[3].channels.submit("%%gpu 1\nprint('ran')")
    await waiting.text("position", 10)
    await notebooks[3].server.interrupt(notebooks[3].kernel)
    result = await waiting.result(10)
    assert result.error.startswith("KeyboardInterrupt")
    assert "ran" not in result.stdout

    async def queue_is_empty() -> bool:
        return not (await asyncio.to_thread(cluster.status))["queues"]

    await eventually(queue_is_empty, "the queue is empty", 10)
    for notebook in notebooks[:3]:
        await notebook.server.interrupt(notebook.kernel)
    for cell in holders:
        assert (await cell.result(10)).error.startswith("KeyboardInterrupt")
    await no_grants(cluster)
    assert await notebooks[3].run("%%gpu 1\n1 + 1") == "2"


@pytest.mark.parametrize(
    "end", ["raise ValueError('no')", "import os; os._exit(1)", "import ctypes; ctypes.string_at(0)"]
)
async def test_the_grant_ends_however_the_cell_ends(cluster: Cluster, notebooks: list[Notebook], end: str) -> None:
    result = await notebooks[0].channels.execute(f"%%gpu 1\n{end}")
    assert result.status == "error"
    await no_grants(cluster)


async def test_a_daemon_restarted_knows_the_grants_of_its_running_cells(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    cell = await notebooks[0].channels.submit("%%gpu 1\n" + HOLD.format(seconds=6))
    await cell.text("begun")
    (held,) = await asyncio.to_thread(grants, cluster)
    os.kill(cluster.daemon_pid(held["host"]), signal.SIGKILL)

    async def there_again() -> bool:
        hosts = (await asyncio.to_thread(cluster.status))["hosts"]
        host = next((h for h in hosts if h["name"] == held["host"]), None)
        return host is not None and any(d["tpcs_granted"] == 66 for d in host["devices"])

    await eventually(there_again, "the new daemon lists the grant", 5)
    assert (await cell.result(30)).status == "ok"
    await no_grants(cluster)


def command(cluster: Cluster, *words: str) -> str:
    """What an `nbos` command about this cluster prints."""
    asked = [sys.executable, "-m", "nbos.cli", *words, "--state-dir", str(cluster.state_dir)]
    done = subprocess.run(asked, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_nbos_gpus_shows_who_holds_what_and_who_waits(cluster: Cluster, notebooks: list[Notebook]) -> None:
    held = await notebooks[0].channels.submit("%%gpu tpcs=16 mem=20G model=H200\n" + HOLD.format(seconds=30))
    whole = [await n.channels.submit("%%gpu 1\n" + HOLD.format(seconds=30)) for n in notebooks[1:3]]
    for cell in [held, *whole]:
        await cell.text("begun")
    waiting = await notebooks[3].channels.submit("%%gpu 1\nprint('ran')")
    await waiting.text("position", 10)

    async def seen() -> dict[str, Any] | None:
        found = json.loads(await asyncio.to_thread(command, cluster, "gpus", "--json"))
        return found if len(found["waiting"]) == 1 and len(found["waiting"][0]["queues"]) == 3 else None

    found = await eventually(seen, "`nbos gpus` shows the waiting cell on every host", 15)
    gpus = [gpu for host in found["hosts"] for gpu in host["gpus"]]
    assert {(gpu["model"], gpu["kind"], gpu["healthy"], gpu["reading"]) for gpu in gpus} == {
        ("Simulated H200", "simulated", True, None)
    }
    grants = {g["kernel"]: (g["user"], g["cell"], g["memory"], len(g["tpcs"])) for gpu in gpus for g in gpu["grants"]}
    assert grants[notebooks[0].kernel] == ("ada", 2, 20 << 30, 16)
    assert [grants[n.kernel][3] for n in notebooks[1:3]] == [66, 66]
    assert found["waiting"][0]["kernel"] == notebooks[3].kernel
    assert found["waiting"][0]["asks"] == {"gpus": 1}
    text = await asyncio.to_thread(command, cluster, "gpus")
    assert "Simulated H200 (simulated)" in text
    assert f"ada   {notebooks[0].kernel[:8]}  2     " in text
    assert "16 (0-15)" in text
    assert "0 of 1 GPUs of host" in text
    for notebook in notebooks:
        await notebook.server.interrupt(notebook.kernel)
    for cell in [held, *whole, waiting]:
        await cell.result(10)
    await no_grants(cluster)


async def test_what_cells_left_goes_to_host_memory_for_another_cell_and_is_back_for_their_next(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    leave = "%%gpu 1\nfrom nbos_kernel import simgpu\nw = simgpu.allocate('60G')\nprint('begun')"
    for notebook in notebooks[:3]:
        assert await notebook.run(leave) == "begun\n"
        await notebook.settled()
    held = [await notebook.channels.submit("%%gpu 1\n" + HOLD.format(seconds=60)) for notebook in notebooks[1:3]]
    for cell in held:
        await cell.text("begun")
    # Whichever hosts those two took: on the third, 60 GiB lie in a process that is idle, or they moved in for it.
    assert await notebooks[3].run("%%gpu 1\nprint(nbos_kernel.grant().tpcs)") == "66\n"
    await notebooks[3].settled()
    assert await notebooks[0].run("%%gpu 1\nprint(w.where == nbos_kernel.grant().devices[0], w.size >> 30)") == (
        "True 60\n"
    )
    for notebook, cell in zip(notebooks[1:3], held, strict=True):
        await notebook.server.interrupt(notebook.kernel)
        await cell.result(10)
    await no_grants(cluster)


async def test_a_gpu_that_an_admin_takes_out_of_use_is_told_to_who_asks_for_it_and_comes_back(
    cluster: Cluster, notebooks: list[Notebook]
) -> None:
    hosts = ["host-1", "host-2", "host-3"]
    said = await asyncio.to_thread(command, cluster, "drain", *hosts, "--gpu", "0", "--reason", "the fans are changed")
    assert said.count("takes no new cells") == 3

    async def refused() -> bool:
        result = await notebooks[0].channels.execute("%%gpu 1\n1")
        return "is out of use: the fans are changed" in result.error

    await eventually(refused, "the cell is told why it gets no GPU", 10)
    assert "out of use: the fans are changed" in await asyncio.to_thread(command, cluster, "gpus")
    assert "the fans are changed" in await asyncio.to_thread(command, cluster, "status")
    await asyncio.to_thread(command, cluster, "drain", *hosts, "--gpu", "0", "--undo")

    async def granted() -> bool:
        return (await notebooks[0].channels.execute("%%gpu 1\n1")).status == "ok"

    await eventually(granted, "the GPUs are granted again", 10)
