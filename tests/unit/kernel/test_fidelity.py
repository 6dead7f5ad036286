"""What a user made with a cell is there on a standby: values, sharing, functions, classes, and what they do
later."""

from __future__ import annotations

import math
import os

import pytest

from nbos_kernel.lost import NotReplicatedError

from .pair import Pair


@pytest.fixture
def pair() -> Pair:
    return Pair()


ASSIGNMENTS = [
    ("a = 1", "a == 1"),
    ("a, (b, *c) = 1, (2, 3, 4)", "(a, b, c) == (1, 2, [3, 4])"),
    ("[first, *rest] = 'abc'", "(first, rest) == ('a', ['b', 'c'])"),
    ("(w := 5)", "w == 5"),
    ("[q := i for i in range(3)]", "q == 2"),
    ("for i, j in enumerate('xy'): pass", "(i, j) == (1, 'y')"),
    ("import io\nwith io.StringIO('hi') as f: t = f.read()", "t == 'hi'"),
    ("match {'k': [1, 2]}:\n    case {'k': [m, *o]}: pass", "(m, o) == (1, [2])"),
    ("a = 1\na += 2", "a == 3"),
    ("d = {}\nd['x'] = 1\nd |= {'y': 2}", "d == {'x': 1, 'y': 2}"),
    ("x: int = 3", "x == 3 and __annotations__['x'] is int"),
    ("try: 1/0\nexcept ZeroDivisionError as err: kept = str(err)", "kept == 'division by zero'"),
    ("globals().update(z=9)", "z == 9"),
    ("def set_y():\n    global y\n    y = 6\nset_y()", "y == 6"),
    ("if True:\n    def f(): return 1\nelse:\n    def g(): return 2", "f() == 1"),
    ("async def co(): return 4", "__import__('asyncio').run(co()) == 4"),
    (
        "import functools\n@functools.lru_cache\ndef fib(n): return n if n < 2 else fib(n-1)+fib(n-2)",
        "fib(30) == 832040",
    ),
    ("double = lambda v: 2 * v", "double(4) == 8"),
    ("try:\n    import json as j\nexcept ImportError:\n    j = None", "j.dumps([1]) == '[1]'"),
    ("from math import pi, sin as s", f"(pi, s(0)) == ({math.pi!r}, 0)"),
    ("import xml.dom.minidom", "xml.dom.minidom.parseString('<a/>') is not None"),
    ("import collections.abc, os.path as p", "p.join('a') == 'a' and collections.abc.Sized"),
    ("n = float('nan'); inf = [float('inf')]", "n != n and inf[0] > 1e308"),
    ("s = {1, (2, 3)}; fs = frozenset('ab'); ba = bytearray(b'x'); r = range(3)", "(2, 3) in s and ba == b'x'"),
    ("from enum import Enum\nclass E(Enum):\n    A = 1\n    B = 2\ne = E.B", "e is E.B and E(1) is E.A"),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2\np = P(1)", "p == P(1, 2)"),
    (
        "from collections import namedtuple, defaultdict\n"
        "T = namedtuple('T', 'a b')\nt = T(1, 2)\ndd = defaultdict(list)",
        "t == T(1, 2)",
    ),
    ("class Slots:\n    __slots__ = ('a',)\ns = Slots(); s.a = 4", "s.a == 4 and isinstance(s, Slots)"),
    ("class M(type): pass\nclass X(metaclass=M): pass\nx = X()", "type(type(x)) is M"),
    (
        "import abc\nclass A(abc.ABC):\n    @abc.abstractmethod\n"
        "    def f(self): ...\nclass B(A):\n    def f(self): return 1",
        "B().f() == 1",
    ),
    (
        "class Prop:\n    @property\n    def v(self): return 3\n    @classmethod\n    def c(cls): return cls",
        "Prop().v == 3 and Prop.c() is Prop",
    ),
    ("big = 'x' * 200_000; same = big", "same is big and len(big) == 200_000"),
    (
        "def f(a, b=[1], *, c=2) -> int:\n    'doc'\n    return a\nf.note = 1",
        "f.note == 1 and f.__doc__ == 'doc' and f.__kwdefaults__ == {'c': 2}",
    ),
    ("import re\npattern = re.compile('a+')", "pattern.match('aa')"),
    ("e1 = ValueError('x', 3)", "e1.args == ('x', 3)"),
    ("with open('/dev/null') as f: pass", "f.closed and f.name == '/dev/null' and f.mode == 'r'"),
    ("d = {'a': 1}\nk = d.keys(); v = memoryview(bytearray(b'xy'))", "d.update(b=2) or 'b' in k and bytes(v) == b'xy'"),
    ("import types\nm = types.ModuleType('made'); m.v = 3", "m.v == 3"),
]


@pytest.mark.parametrize(("code", "check"), ASSIGNMENTS)
def test_a_binding_reaches_the_standby(pair: Pair, code: str, check: str) -> None:
    entry = pair.cell(code)
    assert entry["lost"] == {}
    assert pair.on_standby(check)


MUTATIONS = [
    ("a = [1]; b = a", "b.append(2)", "a == [1, 2] and a is b"),
    ("a = [[0]]; inner = a[0]", "inner[0] = 5", "a == [[5]] and a[0] is inner"),
    ("d = {'k': []}\ndef add(v): d['k'].append(v)", "add(3)", "d == {'k': [3]}"),
    ("class C:\n    x = 1\nc = C()", "C.x = 7", "c.x == 7 and type(c) is C"),
    ("class C:\n    x = 1\n    y = 2\nc = C()", "del C.y", "not hasattr(c, 'y')"),
    ("class C: pass\nc = C()", "class C: new = True", "type(c) is not C and C.new"),
    ("a = 1; b = 2", "del a", "'a' not in globals() and b == 2"),
    ("a = [1]; b = a", "del a", "'a' not in globals() and b == [1]"),
    ("a = [1]; b = a", "b = [2]", "a == [1] and b == [2] and a is not b"),
    ("a = []; a.append(a)", "a.append(1)", "a[0] is a and a[1] == 1"),
    ("def f(): return g()", "def g(): return 10", "f() == 10"),
    ("x = 1\ndef f(): return x", "x = 2", "f() == 2"),
    (
        "total = 0\ndef bump():\n    global total\n    total += 1",
        "bump()",
        "total == 1 and bump() is None and total == 2",
    ),
    ("import os", "os.environ['NOPE'] = '1'; del os.environ['NOPE']", "os.sep"),
    ("v = 1", "v = True", "v is True"),
    ("v = 0.0", "v = -0.0", "str(v) == '-0.0'"),
    ("def f(x=[]):\n    x.append(1)\n    return x", "f()", "f() == [1, 1]"),
]


@pytest.mark.parametrize(("make", "change", "check"), MUTATIONS)
def test_a_change_reaches_the_standby_and_survives_going_back(pair: Pair, make: str, change: str, check: str) -> None:
    pair.cell(make)
    pair.cell(change)
    assert pair.on_standby(check)
    pair.switch()
    pair.cell("pass")
    assert pair.on_standby("True")


def test_a_cell_without_changes_writes_nothing(pair: Pair) -> None:
    pair.cell("import os\na = [1, {}]\nb = a\ndef f(): return a\nclass C: pass\nc = C()\n3")
    assert [c for c in pair.cell("pass")["components"] if c["names"][0][0] != "%"] == []


def test_closures_share_their_variable(pair: Pair) -> None:
    pair.cell(
        "def make():\n    c = 0\n    def inc():\n"
        "        nonlocal c\n        c += 1\n    def get(): return c\n    return inc, get\ninc, get = make()\ninc()"
    )
    assert pair.on_standby("(inc(), get())") == (None, 2)


def test_functions_are_bound_to_the_standbys_own_namespace(pair: Pair) -> None:
    pair.cell("def f(): return undefined_yet")
    assert pair.standby.ns["f"].__globals__ is pair.standby.ns
    pair.cell("undefined_yet = 3")
    assert pair.on_standby("f()") == 3


def test_the_namespace_itself_is_a_reference(pair: Pair) -> None:
    pair.cell("g = globals(); ip = get_ipython(); box = [g]; outs = Out")
    assert pair.on_standby("g") is pair.standby.ns
    assert pair.on_standby("ip") is pair.standby.shell
    assert pair.on_standby("box[0]") is pair.standby.ns
    assert pair.on_standby("outs") is pair.standby.ns["Out"]


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("lost = (i for i in range(3))", "generator"),
        ("import threading\nlost = threading.Lock(); lost.acquire()", "lock"),
        ("lost = open('/dev/null', 'w')", "TextIOWrapper"),
        ("class Bad:\n    def __reduce__(self): raise SystemExit('no')\nlost = Bad()", "Bad"),
        ("class Bad:\n    def __getstate__(self): raise MemoryError\nlost = Bad()", "memory"),
        ("lost = []\nfor _ in range(100000): lost = [lost]", "deep"),
    ],
)
def test_what_cannot_be_pickled_costs_its_own_name_only(pair: Pair, code: str, word: str) -> None:
    entry = pair.cell(code + "\nkept = [1]")
    assert word in entry["lost"]["lost"]
    assert pair.on_standby("kept") == [1]
    assert pair.cell("pass")["lost"] == {}  # said once
    pair.executor.ns.pop("lost")


def test_a_group_loses_only_the_member_that_fails(pair: Pair) -> None:
    entry = pair.cell(
        "import threading\nshared = [1]\na = {'s': shared}\n"
        "held = threading.Lock(); held.acquire()\nb = {'s': shared, 'l': held}; del held"
    )
    assert list(entry["lost"]) == ["b"]
    assert pair.on_standby("a['s'] is shared")


def test_touching_a_lost_name_says_which_and_why(pair: Pair) -> None:
    pair.cell("gen = (i for i in [1])\ndef use(): return gen")
    pair.switch()
    error = pair.executor.run("gen").error_in_exec
    assert isinstance(error, NotReplicatedError)
    assert "'gen'" in str(error)
    assert "generator" in str(error)
    assert isinstance(pair.executor.run("len([gen])").error_in_exec, NameError)
    assert pair.executor.run("print").error_in_exec is None
    assert type(pair.executor.run("unknown_name").error_in_exec) is NameError


def test_assigning_a_lost_name_heals_it(pair: Pair) -> None:
    pair.cell("gen = (i for i in [1])")
    pair.switch()
    entry = pair.cell("gen = 5")
    assert entry["deleted"] == []
    assert pair.on_standby("gen") == 5
    assert pair.executor.replica.lost == {}


def test_what_does_not_load_is_lost_on_the_standby_only(pair: Pair) -> None:
    trap = "class Trap:\n    def __setstate__(self, s): raise ValueError('cannot come back')\n"
    code = trap + "t = Trap(); t.x = 1\nok = [2]"
    pair.cell(code)
    assert "cannot come back" in pair.standby.replica.lost["t"]
    assert pair.on_standby("ok") == [2]


def test_reducers_that_print_are_muted(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.cell("class Loud:\n    def __reduce__(self):\n        print('LOUD')\n        return (list, ())\nl = Loud()")
    assert "LOUD" not in capsys.readouterr().out
    assert "comes back from its pickle as list" in pair.standby.replica.lost["l"]


def test_results_and_inputs_are_rebuilt(pair: Pair) -> None:
    pair.cell("[1, 2]")
    pair.cell("'second'")
    assert pair.on_standby("_") == "second"
    assert pair.on_standby("__") == [1, 2]
    assert pair.on_standby("_1") is pair.on_standby("Out[1]")
    assert pair.on_standby("In")[1:] == ["[1, 2]", "'second'"]
    assert pair.on_standby("_i1") == "[1, 2]"
    assert pair.standby.shell.execution_count == 3
    pair.switch()
    pair.cell("7")
    assert pair.on_standby("(_, __, ___)") == (7, "second", [1, 2])


def test_magics_reach_the_standby(pair: Pair, tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.getcwd())
    monkeypatch.setenv("NBX_TEST", "old")
    entry = pair.cell(f"%cd -q {tmp_path}\n%env NBX_TEST=new\nimport sys; sys.path.append('/nowhere')")
    assert entry["effects"]["cwd"] == str(tmp_path)
    assert entry["effects"]["environ"]["NBX_TEST"] == "new"
    assert entry["effects"]["sys_path"][-1] == "/nowhere"
    import sys

    sys.path.remove("/nowhere")


def test_reset_empties_the_standby(pair: Pair) -> None:
    pair.cell("a = [1]\na")
    pair.cell("%reset -f")
    assert "a" not in pair.standby.ns
    assert "_1" not in pair.standby.ns


def test_a_whole_state_replaces_everything(pair: Pair) -> None:
    import asyncio

    pair.cell("a = 1; gone = 2")
    entry = pair.cell("b = [a]")
    state = {
        "type": "state",
        "upto": 9,
        "execution_count": 8,
        "components": [],
        "lost": {"x": "why"},
        "history": [[8, "b"]],
    }
    assert entry["components"]
    pair.standby.replica.arrived(state, b"")
    asyncio.run(pair.standby.replica.catch_up(lambda n, lost: None))
    assert "a" not in pair.standby.ns
    assert pair.standby.replica.applied == 9
    assert pair.standby.shell.execution_count == 9
    assert pair.standby.replica.lost == {"x": "why"}


def test_only_the_names_that_a_fold_left_are_set(pair: Pair) -> None:
    import asyncio

    entry = pair.cell("a = [1]\nb = a")
    payload = pair.payload
    (component,) = (c for c in entry["components"] if "a" in c["names"])
    narrowed = {"type": "state", "upto": 5, "execution_count": 1, "components": [{**component, "names": ["b"]}]}
    pair.standby.replica.arrived(narrowed, payload)
    asyncio.run(pair.standby.replica.catch_up(lambda n, lost: None))
    assert pair.on_standby("b") == [1]
    assert "a" not in pair.standby.ns
