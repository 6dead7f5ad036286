"""What cells change, in every way Python and IPython know, is there on another replica after a kill -9 of the executor.

Everything is changed on one kernel, which then loses its executor once: `changing_cells.CASES` is the
table of the namespace; the other tests look at what magics, comms and widgets leave outside of it.
"""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from tests.system.changing_cells import CASES
from tests.system.channels import Result
from tests.system.cluster import Cluster, Notebook
from tests.system.debugger import Debugger
from tests.system.hubclient import eventually
from tests.system.widgets import moved, slider

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("features-state") / "state")
    cluster.start()
    yield cluster
    assert cluster.stop() == []


@pytest_asyncio.fixture(loop_scope="module")
async def notebook(cluster: Cluster) -> AsyncIterator[Notebook]:
    notebook = await Notebook.open(cluster, "ada")
    yield notebook
    assert notebook.channels.unaccounted() == []
    await notebook.close()


async def kill_the_executor(notebook: Notebook) -> None:
    await notebook.settled()
    os.kill((await notebook.executor()).pid, signal.SIGKILL)


async def test_every_way_to_change_the_namespace_survives(notebook: Notebook) -> None:
    for name, case in CASES.items():
        for code in (case.setup, case.change):
            result = await notebook.channels.execute(code, 60)
            assert (result.status, "NBOS" in result.stderr) == ("ok", False), (name, result.error, result.stderr)
    failed = await notebook.channels.execute("l34.append(2); a34 = 3; 1 / 0; a34 = 4")
    assert failed.status == "error"
    before = {name: await notebook.run(case.probe) for name, case in CASES.items()}
    pid = await notebook.run("import os; os.getpid()")
    await kill_the_executor(notebook)
    assert await notebook.run("os.getpid()") != pid
    after = {name: await _tried(notebook, case.probe) for name, case in CASES.items()}
    assert after == before
    assert await notebook.run("await f12(1)") == "3"


async def _tried(notebook: Notebook, probe: str) -> str:
    result = await notebook.channels.execute(probe)
    return result.value or result.error


def wheel(folder: Path, name: str) -> Path:
    """A pure package of one module, as `pip` takes it without a network."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "SPEED = 88\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


async def test_what_magics_change_outside_the_namespace_survives(notebook: Notebook, tmp_path: Path) -> None:
    package = f"nbos_test_{os.getpid()}"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "beside.py").write_text("WHERE = 'beside'\n")
    await notebook.run(f"%cd {tmp_path}\n%env HERON=grey\nimport os, sys; os.environ['EGRET'] = 'white'")
    await notebook.run("os.environ.pop('LANG', None); sys.path.append(os.path.abspath('mine'))")
    await notebook.run(f"%pip install -q --no-index {wheel(tmp_path, package)}", 90)
    try:
        await notebook.run("%precision 3\n%load_ext autoreload\n%autoreload 2")
        await notebook.run("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()", 60)
        await kill_the_executor(notebook)
        seen = "print(os.getcwd(), os.environ['HERON'], os.environ['EGRET'], 'LANG' in os.environ)"
        assert await notebook.run(seen) == f"{tmp_path} grey white False\n"
        assert await notebook.run("import beside; beside.WHERE") == "'beside'"
        assert await notebook.run(f"import {package}; {package}.SPEED") == "88"
        assert await notebook.run("1 / 3") == "0.333"
        assert "autoreload" in await notebook.run("print(get_ipython().extension_manager.loaded)")
        assert (await notebook.run("!echo $HERON")).split() == ["grey"]
        assert _figures(await notebook.channels.execute("plt.plot([3, 1]); plt.show()")) == 1
        assert _figures(await notebook.channels.execute("plt.plot([3, 1]);")) == 1
    finally:
        await notebook.run(f"%pip uninstall -q -y {package}", 90)


def _figures(result: Result) -> int:
    return len([m for m in result.outputs if m.type == "display_data" and "image/png" in m.content["data"]])


async def test_inputs_outputs_and_counts_go_on(notebook: Notebook) -> None:
    await notebook.run("'first'")
    await notebook.run("[2]")
    count = (await notebook.channels.execute("'third'")).reply["execution_count"]
    await kill_the_executor(notebook)
    result = await notebook.channels.execute("(_, __, ___, Out[1], _2, In[1], In[2], _i, _ii)")
    assert result.value == repr(("third", [2], "first", "first", [2], "'first'", "[2]", "'third'", "[2]"))
    assert result.reply["execution_count"] == count + 1
    assert await notebook.run("Out[2] is _2") == "True"
    history = await notebook.run("%history")
    assert "'third'" in history
    asked = {"output": False, "raw": True, "hist_access_type": "range", "session": 0, "start": 1, "stop": 4}
    found = await notebook.channels.request("history_request", asked)
    assert [source for _, _, source in found["history"]] == ["'first'", "[2]", "'third'"]


async def last_entry(notebook: Notebook) -> int:
    return int((await notebook.model())["last"])


async def entry_after(notebook: Notebook, n: int) -> int:
    async def there() -> int | None:
        last = await last_entry(notebook)
        return last if last > n else None

    return await eventually(there, f"the changes between cells are in the log after entry {n}", 15)


async def test_what_comms_and_subshells_changed_between_cells_survives(notebook: Notebook) -> None:
    await notebook.run(
        "heard = []\ndef opened(comm, message):\n    heard.append(message['content']['data'])\n"
        "    comm.on_msg(lambda m: heard.append(m['content']['data']))\n"
        "get_ipython().kernel.comm_manager.register_target('front', opened)"
    )
    await notebook.settled()
    last = await last_entry(notebook)
    comm, _ = await notebook.channels.comm_open("front", {"n": 1})
    message = await notebook.channels.comm_msg(comm, {"n": 2})
    await message.wait(lambda cell: cell.idle is not None, "idle", 10)
    last = await entry_after(notebook, last)
    made = await notebook.channels.request("create_subshell_request", {}, channel="control")
    await notebook.run("aside = 5", subshell_id=made["subshell_id"])
    await entry_after(notebook, last)
    await kill_the_executor(notebook)
    assert await notebook.run("(heard, aside)") == "([{'n': 1}, {'n': 2}], 5)"
    for probe in ("1 + 1", "aside"):
        gone = await notebook.channels.execute(probe, subshell_id=made["subshell_id"])
        assert gone.status in ("ok", "error")


async def test_a_cell_waits_for_the_callback_before_it_on_the_replica_that_runs_it(notebook: Notebook) -> None:
    await notebook.run(
        "import time\nheard = []\ndef opened(comm, message):\n    time.sleep(2)\n    heard.append('all')\n"
        "get_ipython().kernel.comm_manager.register_target('front', opened)"
    )
    await notebook.settled()
    before = await notebook.executor()
    await notebook.channels.comm_open("front", {})
    cell = await notebook.channels.submit("heard")
    await cell.text("still runs what a widget (a comm) asked for")
    result = await cell.result()
    assert result.value == "['all']", result
    assert (await notebook.executor()).pid == before.pid


async def test_a_task_that_keeps_the_event_loop_loses_nothing_to_another_replica(notebook: Notebook) -> None:
    await notebook.run(
        "import asyncio, time\nticks = []\n"
        "async def heavy():\n    while len(ticks) < 3:\n        await asyncio.sleep(0.05)\n        time.sleep(0.7)\n"
        "        ticks.append(1)\n"
        "task = asyncio.create_task(heavy())"
    )
    before = await notebook.executor()
    for _ in range(4):
        await notebook.run("seen = len(ticks)")
    assert await notebook.run("await task; ticks") == "[1, 1, 1]"
    assert (await notebook.executor()).pid == before.pid


async def test_a_widget_after_a_failover_is_honest(notebook: Notebook) -> None:
    model, told = await slider(notebook, "w")
    assert "'w' is not replicated" in told
    await notebook.run("seen = []; w.observe(lambda change: seen.append(change['new']), 'value')")
    await moved(notebook, model, 9)
    assert await notebook.run("(w.value, seen)") == "(9, [9])"
    await kill_the_executor(notebook)
    result = await notebook.channels.execute("w.value")
    assert result.error.startswith("NotReplicatedError")
    assert "IntSlider" in result.error
    assert await notebook.run("seen") == "[9]"
    await moved(notebook, model, 4)  # its view in the page is dead, and nothing breaks over it
    again, _ = await slider(notebook, "w")
    await moved(notebook, again, 6)
    assert await notebook.run("w.value") == "6"


async def test_what_a_log_entry_cannot_hold_is_told_and_named_after_a_failover(notebook: Notebook) -> None:
    raw = "os.environ['RAW'] = os.fsdecode(b'caf\\xe9'); globals()['n' * 5000] = 1"
    result = await notebook.channels.execute(f"import os; {raw}; fine = 1", 60)
    assert "'%env RAW' is not replicated" in result.stderr
    assert "5000 characters" in result.stderr
    many = "globals().update({f'variable_with_a_name_{i:06}': [i] for i in range(30_000)})"
    await notebook.run(many)  # more than an entry holds: they stand in a table beside it
    assert "%env RAW" in await notebook.run("%nbos status")
    await kill_the_executor(notebook)
    assert await notebook.run("fine + variable_with_a_name_029999[0]") == "30000"
    assert await notebook.run("len([name for name in globals() if name.startswith('variable_with')])") == "30000"
    assert (await notebook.channels.execute("n" * 5000)).error.startswith("NotReplicatedError")


async def test_a_debugger_whose_replica_died_is_told_and_starts_again(notebook: Notebook) -> None:
    await notebook.run("None")
    for _ in range(2):
        debug = Debugger(notebook.channels)
        assert (await debug("debugInfo"))["isStarted"] is False
        await debug("initialize", clientID="jupyterlab", adapterID="", linesStartAt1=True)
        await debug("attach")
        await kill_the_executor(notebook)
        result = await notebook.channels.execute("1 + 1")
        assert (result.value, "start debugging again" in result.stderr) == ("2", True)
        assert (await notebook.channels.execute("1 + 1")).stderr == ""


async def test_standbys_of_a_lazy_kernel_leave_large_values_in_the_store(cluster: Cluster) -> None:
    lazy = await Notebook.open(cluster, "lina", {"lazy": "16M"})
    await lazy.run("import numpy as np, os")
    before = await private_memory(lazy)
    make = "a, b, c = (np.random.default_rng(i).random(12_500_000) for i in range(3)); (a[0] + b[0] + c[0])"
    total = await lazy.run(make)
    mine = (await lazy.executor()).index
    after = await private_memory(lazy)
    grown = {index: after[index] - before[index] for index in after}
    assert grown.pop(mine) > 290e6
    assert max(grown.values()) < 30e6
    await kill_the_executor(lazy)
    listed = await lazy.run("%who_ls ")
    assert listed == "['a', 'b', 'c', 'np', 'os']"
    assert await lazy.run("b[0] == np.random.default_rng(1).random(1)[0]") in ("True", "np.True_")
    now = await private_memory(lazy)
    assert 90e6 < now[(await lazy.executor()).index] - before[(await lazy.executor()).index] < 160e6
    assert await lazy.run("a[0] + b[0] + c[0]") == total
    await lazy.close()


async def private_memory(notebook: Notebook) -> dict[int, int]:
    """Bytes that only the replica itself uses, by its index, once all have applied everything."""
    await notebook.run("pass")  # its bid waits until the cell before is in the log
    found = await notebook.settled()
    return {replica.index: psutil.Process(replica.pid).memory_full_info().uss for replica in found}
