"""Ties between objects that a pickle does not show, and changes that no cell's text shows: found by random programs.

Each case runs on an executor, fails over, goes on on the standby, and must give what one process gives.
"""

from __future__ import annotations

import pytest

from nbos_kernel.capture.attached import Instances

from .pair import Pair, Side

FRAMES = "import pandas as pd\ndf = pd.DataFrame({'x': [1, 2, 3], 'y': [4, 5, 6]}); "

TIES = {
    "a library's list that is a variable as well": (
        ["import matplotlib\np = matplotlib.rcParams['axes.formatter.limits']; q = [p]"],
        "x = 1", "(q, q[0] is p)"),
    "a column of a frame, the frame is written": (
        [FRAMES + "s = df['x']"], "df.loc[0, 'x'] = 9", "(df['x'].tolist(), s.tolist())"),
    "a column of a frame, the column is written": (
        [FRAMES + "s = df['x']"], "s.iloc[0] = 9", "(df['x'].tolist(), s.tolist())"),
    "a lazy copy of a frame": ([FRAMES + "other = df[:]"],
        "df.iloc[0, 0] = 9", "(df.values.tolist(), other.values.tolist())"),
    "an index on a series' memory": (
        ["import pandas as pd\ns = pd.Series([1, 2]); i = pd.Index(s)"], "s.iloc[0] = 9", "(s.tolist(), i.tolist())"),
    "frames of several types": (
        ["import pandas as pd\n"
         "df = pd.DataFrame({'x': ['a', 'b'], 'c': pd.Categorical(['u', 'v'])}); s = df['x']; c = df['c']"],
        "df.loc[0, 'x'] = 'q'; df.loc[0, 'c'] = 'v'", "(df.values.tolist(), s.tolist(), c.tolist())"),
    "attributes that are items": (
        ["class A(dict):\n    def __init__(self, **k):\n        super().__init__(**k)\n"
         "        self.__dict__ = self\na = A(x=1)"],
        "a.y = 2; a['z'] = 3", "(sorted(a), a.z)"),
    "attributes that all instances share": (
        ["class B:\n    all = {}\n    def __init__(self): self.__dict__ = self.all\n"
         "a = B(); b = B()"], "b.y = 2", "(a.y, B.all)"),
    "a variable that is an instance's attributes": (
        ["class K: pass\na = K(); d = a.__dict__; d['x'] = 1", "pass"], "d['y'] = 2; a.z = 3", "(a.y, d)"),
    "a variable that is a function's attributes": (["def f(): pass\nd = f.__dict__; d['x'] = 1"], "f.y = 2", "d"),
    "a view of a class' attributes": (["class K: pass\nv = vars(K)", "pass"], "K.x = 2", "(v['x'], 'x' in vars(K))"),
    "a view of a dictionary": (["import types\nd = {}; v = types.MappingProxyType(d)"], "d['x'] = 2", "v['x']"),
    "a proxy": (
        ["import weakref\nclass K: pass\na = K(); p = weakref.proxy(a)"], "a.x = 2", "(p.x, type(p).__name__)"),
    "the constants of a library": (
        ["import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\nm = dataclasses.MISSING"],
        "@dataclasses.dataclass\nclass Q(P):\n    z: int", "(repr(Q(1, 2)), m is dataclasses.MISSING)"),
    "slots": (
        ["class S:\n    __slots__ = ('a', '__b')\n    def __init__(self): self.__b = 3\n"
         "    def b(self): return self.__b\ns = S()"],
        "s.a = 1", "(hasattr(s, '__dict__'), type(S.a).__name__, s.a, s.b())"),
    "slots with docs, of a base, of a dataclass": (
        ["from dataclasses import dataclass\nclass A:\n    __slots__ = {'a': 'its doc'}\n@dataclass(slots=True)\n"
         "class B(A):\n    x: int = 1\nb = B()"], "b.a = 5", "(hasattr(b, '__dict__'), A.a.__doc__, b.a, b)"),
    "a named tuple, which has slots of its own": (
        ["from typing import NamedTuple\nclass P(NamedTuple):\n    x: int = 1\n"
         "p = P(3)"], "q = p._replace(x=4)", "(p, q, type(p) is P)"),
    "aliases and members of an enum": (
        ["import enum\nclass E(enum.Enum):\n    A = 1\n    B = 1\n"
         "    def __init__(self, n): self.log = [n]", "E.A.log.append(2)"],
        "E.B.log.append(3)", "(E.B is E.A, E.A.log, list(E.__members__))"),
    "flags of several bits": (
        ["import enum\nclass F(enum.IntFlag):\n    X = 1\n    Y = 2\n"
         "    XY = 3"], "z = F.X | F.Y", "(z is F.XY, list(F.__members__))"),
    "the dictionary that exec was given": (
        ["ns = {}\nexec('x = 1\\ndef f(): return x', ns)\nf = ns['f']"], "ns['x'] = 3", "(f(), f.__globals__ is ns)"),
    "a module made by hand": (
        ["import types\nm = types.ModuleType('m'); exec('x = 1\\ndef f(): return x', m.__dict__); n = m; f = m.f"],
        "n.x = 6", "(f(), m.f is f, m is n)"),
    "a module's own globals": (
        ["import contextlib\n@contextlib.contextmanager\ndef cm(): yield 1"], "pass",
        "cm.__globals__ is vars(contextlib)"),
    "windows over an array": (
        ["import numpy as np\n"
         "a = np.arange(5); w = np.lib.stride_tricks.sliding_window_view(a, 3)"], "a[1] = 9", "w.tolist()"),
    "an array of objects that is read only": (
        ["import numpy as np\na = np.array([[1], None], dtype=object); a.flags.writeable = False"], "a[0].append(2)",
        "(a.flags.writeable, a.tolist())"),
    "a view of an array in Fortran's order": (
        ["import numpy as np\na = np.asfortranarray(np.arange(6).reshape(2, 3)); b = a.T"], "a[0, 1] = 9",
        "(b.tolist(), type(b.base).__name__)"),
}  # fmt: skip

CHANGES = {
    "a lambda that a timer calls": (
        ["import threading\nxs = []", "gate = threading.Event()\n"
         "t = threading.Thread(target=lambda: (gate.wait(9), xs.append(1)))\n"
         "t.start()\nimport collections\ncollections.t = t\ndel t", "1", "import collections\n"
          "gate.set(); collections.t.join()"]),
    "a thread whose function was deleted": (
        ["import threading, collections\nxs = []\ncollections.gate = threading.Event()\n"
         "def work(gate=collections.gate):\n"
         "    gate.wait(9); xs.append(1)\n"
          "collections.t = threading.Thread(target=work); collections.t.start(); del work",
         "1", "import collections\ncollections.gate.set(); collections.t.join()"]),
    "a handler of a signal": (
        ["import signal, os\nxs = []\nsignal.signal(signal.SIGUSR1, lambda *_: xs.append(1)) and None", "1",
         "os.kill(os.getpid(), signal.SIGUSR1)"]),
    "a hook in a library": (
        ["import collections\nxs = []\ncollections.hook = lambda: xs.append(1)", "1", "collections.hook()"]),
    "a hook that calls a function of the notebook": (
        ["import collections\nxs = []\ndef note(): xs.append(1)\n"
         "collections.hook = lambda: note()", "1", "collections.hook()"]),
    "an object in a structured array": (
        ["import numpy as np, collections\nL = []; xs = np.array([(L, 1)], dtype=[('o', object), ('i', int)])\n"
         "collections.held = L; del L", "1", "collections.held.append(1)"]),
    "the shell in a variable": (["ip = get_ipython(); xs = []", "1", "ip.ev('x' + 's').append(1)"]),
    "the namespace in an object": (
        ["class K: pass\nk = K(); k.all = globals(); xs = []", "1", "k.all['x' + 's'].append(1)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TIES)
def test_a_tie_survives_a_failover(case: str) -> None:
    cells, then, look = TIES[case]
    alone, pair = Pair(), Pair()
    for cell in cells:
        alone.executor.run(cell)
        assert pair.cell(cell)["lost"] == {}
    pair.switch()
    alone.executor.run(then)
    pair.cell(then)
    wanted = repr(alone.executor.eval(look))
    assert repr(pair.executor.eval(look)) == wanted
    assert repr(pair.standby.eval(look)) == wanted


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_found_though_no_cell_names_what_changed(case: str) -> None:
    pair = Pair()
    for cell in [*CHANGES[case], "1"]:
        pair.cell(cell)
    assert "1" in repr(pair.executor.eval("xs")).replace("(list([]), 1)", "").replace("([], 1)", "")
    assert repr(pair.on_standby("xs")) == repr(pair.executor.eval("xs"))


def test_functions_outside_of_variables_are_forgotten_when_they_are_gone() -> None:
    pair = Pair()
    pair.cell("import collections\nxs = [1]\ndef f(): return xs\ncollections.hook = lambda: xs.append(1)")
    outside = pair.executor.replica.capture.outside
    assert "xs" in outside.words
    pair.cell("del collections.hook")
    assert outside.words == frozenset()


def test_a_cell_that_a_traceback_keeps_does_not_make_every_look_a_long_one() -> None:
    side = Side({})
    look = side.replica.capture.outside.look
    assert list(look(()))  # the first one looks through everything
    side.run("import linecache, sys\ntry:\n    1 / 0\nexcept ZeroDivisionError as err:\n    linecache.kept = err")
    assert list(look(()))
    assert not list(look(()))  # what was found then is still all there is
    side.run("linecache.later = lambda: hidden")
    assert list(look(()))
    assert "hidden" in side.replica.capture.outside.words
    assert not list(look(()))
    assert "hidden" in side.replica.capture.outside.words
    side.run("del linecache.later, linecache.kept")
    assert not list(look(()))
    assert not side.replica.capture.outside.words
    side.run("linecache.later = lambda: again")
    assert list(look(()))
    assert "again" in side.replica.capture.outside.words
    side.run("del linecache.later")


def test_a_dead_proxy_is_lost_and_nothing_else() -> None:
    pair = Pair()
    entry = pair.cell("import weakref\nclass K: pass\np = weakref.proxy(K()); kept = [1]")
    assert list(entry["lost"]) == ["p"]
    assert pair.on_standby("kept") == [1]


def test_a_finalizer_is_named_as_lost() -> None:
    pair = Pair()
    entry = pair.cell("import weakref\nclass K: pass\nk = K(); f = weakref.finalize(k, print)")
    assert "belongs to the process" in entry["lost"]["f"]


def test_a_group_that_is_not_changed_is_not_written_again() -> None:
    pair = Pair()
    pair.cell("class K: pass\na = K(); a.x = [1]; b = [a]")
    assert [c["names"] for c in pair.cell("(a.x, b) and None")["components"] if "a" in c["names"]] == []


def test_a_value_whose_data_is_gone_is_written_again_when_its_cell_runs_again() -> None:
    pair = Pair()
    make = "wide = bytes(range(256)) * 1000"
    pair.cell("other = 1")
    read, pair.standby.replica._read = pair.standby.replica._read, _gone
    pair.cell(make)
    assert "gone from the store" in pair.standby.replica.lost["wide"]
    pair.standby.replica._read = read
    pair.switch()
    assert ["wide"] in [component["names"] for component in pair.cell(make)["components"]]
    assert pair.on_standby("len(wide)") == 256_000


async def _gone(*_: object) -> int:
    raise OSError("gone from the store")


def test_a_librarys_constant_is_written_the_same_way_whoever_else_holds_it() -> None:
    """Else a figure's pickle would depend on which pickles were made before it and are still there."""
    markers = pytest.importorskip("matplotlib.markers")
    path = next(value for value in vars(markers).values() if type(value) is markers.Path)
    before = Instances().reduce(path)
    held = vars(path)  # as the memo of another pickle does
    assert Instances().reduce(path) == before
    del held
