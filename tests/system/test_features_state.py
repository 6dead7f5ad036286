"""What cells change, in every way Python and IPython know, is there on another replica after a kill -9 of the executor.

Everything is changed on one kernel, which then loses its executor once: `SURVIVES` is the table of the namespace,
`notebook` holds what magics and widgets left outside of it.
"""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.system.channels import Result
from tests.system.cluster import Cluster, Notebook
from tests.system.hubclient import eventually
from tests.system.test_features import moved, slider

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


@dataclass(frozen=True)
class Case:
    """`setup` and `change` are cells; `probe` is an expression that must give the same before and after."""

    setup: str
    change: str
    probe: str


SURVIVES = {
    "plain": Case("a1 = 1", "a1 = 2", "a1"),
    "augmented": Case("a2 = [1]; a2b = a2", "a2 += [2]", "(a2, a2b, a2 is a2b)"),
    "annotated": Case("a3: int = 1", "a3: int = 2\na3b: str", "(a3, __annotations__['a3'])"),
    "unpacked": Case("pass", "a4, *b4 = (c4, d4) = [1, 2] and (1, 2)", "(a4, b4, c4, d4)"),
    "walrus": Case("pass", "if (a5 := 7) > 3: pass\n[b5 := i for i in range(3)]", "(a5, b5)"),
    "loop": Case("pass", "for a6 in range(4):\n    with open('/dev/null') as b6: pass", "(a6, b6.closed)"),
    "caught": Case("pass", "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    a7 = str(e)", "(a7, 'e' in globals())"),
    "matched": Case("pass", "match {'x': [1, 2]}:\n    case {'x': [a8, *b8]}: pass", "(a8, b8)"),
    "deleted": Case("a9 = b9 = [1]", "del a9", "('a9' in globals(), b9)"),
    "attribute": Case("import types; o10 = types.SimpleNamespace(x=1)", "o10.x = 2; o10.y = []; del o10.x", "vars(o10)"),
    "item": Case("a11 = {'k': [1, 2, 3]}", "a11['k'][0:2] = [9]; a11['n'] = a11['k']", "(a11, a11['n'] is a11['k'])"),
    "async def": Case("pass", "async def f12(x):\n    return x + a1", "__import__('inspect').iscoroutinefunction(f12)"),
    "conditional def": Case("pass", "if True:\n    def f13(): return 'yes'\nelse:\n    def f13(): return 'no'", "f13()"),
    "decorated": Case(
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def inner(*a): return 2 * f(*a)\n    return inner",
        "@twice\ndef f14(n):\n    'Doc.'\n    return n",
        "(f14(4), f14.__name__, f14.__doc__)",
    ),
    "default argument": Case("def f15(x, seen=[]):\n    seen.append(x); return len(seen)", "f15(1); f15(2)", "f15(0) > 2"),
    "closure": Case(
        "def make():\n    n = 0\n    def up():\n        nonlocal n; n += 1; return n\n    return up, lambda: n",
        "up16, see16 = make(); up16(); up16()",
        "see16()",
    ),
    "class": Case(
        "class C17:\n    kind = 'old'\n    def name(self): return self.kind\nc17 = C17()",
        "C17.kind = 'new'; C17.shout = lambda self: self.name().upper()",
        "(c17.shout(), type(c17) is C17)",
    ),
    "import in try": Case("pass", "try:\n    import nothing_there\nexcept ImportError:\n    import json as m18", "m18.__name__"),
    "from import": Case("pass", "from collections import OrderedDict as O19, deque\nimport xml.dom.minidom", "(O19.__name__, xml.dom.minidom.__name__)"),
    "alias": Case("a20 = {'x': [1]}; b20 = a20['x']", "b20.append(2)", "(a20, a20['x'] is b20)"),
    "through a function": Case(
        "a21 = 0; l21 = []\ndef f21():\n    global a21, new21\n    a21 += 5; new21 = 'made'; l21.append(a21)",
        "f21(); f21()",
        "(a21, new21, l21)",
    ),
    "globals()": Case("pass", "globals()['a22'] = 1; globals().update(b22=[1], c22=2); globals().pop('c22')", "(a22, b22, 'c22' in globals())"),
    "exec and setattr": Case("import __main__", "exec('a23 = 4'); setattr(__main__, 'b23', 5); get_ipython().push({'c23': 6})", "(a23, b23, c23)"),
    "magics": Case("pass", "%time a24 = 3\nb24 = !echo hi\n%xmode Context", "(a24, list(b24))"),
    "cell magic": Case("pass", "%%capture c25\na25 = 1\nprint('kept')", "(a25, c25.stdout)"),
    "cycle": Case("a26 = []; b26 = {'a': a26}", "a26.append(b26)", "(a26[0] is b26, b26['a'] is a26)"),
    "numpy view": Case("import numpy as np; a27 = np.arange(10); b27 = a27[2:5]", "b27[:] = 0", "(a27.tolist(), np.shares_memory(a27, b27))"),
    "numpy large": Case("a28 = np.zeros((500, 500)); b28 = a28.T", "a28[1, 2] = 7", "(b28[2, 1], np.shares_memory(a28, b28), a28.flags.writeable)"),
    "pandas": Case("import pandas as pd; d29 = pd.DataFrame({'x': [1, 2]})", "d29['y'] = d29.x * 2; d29.loc[0, 'x'] = 9", "d29.to_dict('list')"),
    "generator state": Case("import random; r30 = random.Random(4); g30 = np.random.default_rng(4)", "r30.random(); g30.random()", "(r30.getstate()[1][-1], str(g30.bit_generator.state))"),
    "builtin types": Case("import collections, datetime, decimal, re", "a31 = [{1}, frozenset([2]), b'x', bytearray(b'y'), 3j, ..., range(3), slice(1), re.compile('x'), datetime.date(2026, 1, 2), decimal.Decimal('1.5'), collections.Counter('aab')]", "a31"),
    "dataclass and enum": Case(
        "import dataclasses, enum\n@dataclasses.dataclass\nclass D32:\n    x: int = 0\nclass E32(enum.Enum):\n    RED = 1",
        "d32 = D32(4); e32 = E32.RED",
        "(d32 == D32(4), repr(d32), e32 is E32.RED)",
    ),
    "tensor": Case("import torch; t33 = torch.zeros(4); v33 = t33[1:]; m33 = torch.nn.Linear(2, 1)", "v33 += 1; w33 = m33.weight", "(t33.tolist(), w33 is m33.weight)"),
    "error in the cell": Case("a34 = 1; l34 = []", "l34.append(1); a34 = 2", "(a34, l34)"),
}  # fmt: skip


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
    for name, case in SURVIVES.items():
        for code in (case.setup, case.change):
            result = await notebook.channels.execute(code, 60)
            assert (result.status, "NBOS" in result.stderr) == ("ok", False), (name, result.error, result.stderr)
    failed = await notebook.channels.execute("l34.append(2); a34 = 3; 1 / 0; a34 = 4")
    assert failed.status == "error"
    before = {name: await notebook.run(case.probe) for name, case in SURVIVES.items()}
    pid = await notebook.run("import os; os.getpid()")
    await kill_the_executor(notebook)
    assert await notebook.run("os.getpid()") != pid
    after = {name: await _tried(notebook, case.probe) for name, case in SURVIVES.items()}
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
        await notebook.run("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()", 60)
        await kill_the_executor(notebook)
        seen = "print(os.getcwd(), os.environ['HERON'], os.environ['EGRET'], 'LANG' in os.environ)"
        assert await notebook.run(seen) == f"{tmp_path} grey white False\n"
        assert await notebook.run("import beside; beside.WHERE") == "'beside'"
        assert await notebook.run(f"import {package}; {package}.SPEED") == "88"
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


async def test_what_comms_and_subshells_changed_between_cells_survives(notebook: Notebook) -> None:
    await notebook.run(
        "heard = []\ndef opened(comm, message):\n    heard.append(message['content']['data'])\n"
        "    comm.on_msg(lambda m: heard.append(m['content']['data']))\n"
        "get_ipython().kernel.comm_manager.register_target('front', opened)"
    )
    comm, _ = await notebook.channels.comm_open("front", {"n": 1})
    message = await notebook.channels.comm_msg(comm, {"n": 2})
    await message.wait(lambda cell: cell.idle is not None, "idle", 10)
    made = await notebook.channels.request("create_subshell_request", {}, channel="control")
    await notebook.run("aside = 5", subshell_id=made["subshell_id"])
    last = (await notebook.model())["last"]

    async def replicated() -> bool:
        return int((await notebook.model())["last"]) > last

    await eventually(replicated, "the changes between cells are in the log", 10)
    await kill_the_executor(notebook)
    assert await notebook.run("(heard, aside)") == "([{'n': 1}, {'n': 2}], 5)"
    for probe in ("1 + 1", "aside"):
        gone = await notebook.channels.execute(probe, subshell_id=made["subshell_id"])
        assert gone.status in ("ok", "error")


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
