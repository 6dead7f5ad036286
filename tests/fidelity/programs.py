"""Random programs: cells over five names, in every way in which Python lets variables share and change.

`A`, `B`, `C` in a cell stand for names, `V` for a small value. Programs mean the same in plain Python and in a
notebook: nothing depends on the order of a set, on addresses or on time. A cell may fail in its middle; what it did
before stays.
"""

from __future__ import annotations

import re

from hypothesis import strategies as st

NAMES = ("a", "b", "c", "d", "e")
VALUES = ("0", "1.5", "True", "'x'", "None", "(1, 2)", "[]", "[1]", "{}", "{'k': []}", "set()", "bytearray(b'q')")

BASIC = (
    "A = V",
    "A = V; B = A",
    "A = B",
    "A, B = B, A",
    "A = [B, {'v': C}]",
    "A = (B, [C])",
    "A = {'x': B, 'y': [B, C]}",
    "A = [[V], [V]]; B = A[0]; C = A[-1]",
    "A.append(B)",
    "A['n'] = B",
    "A[0] = V",
    "A += [V]",
    "A *= 2",
    "A.update(z=B)",
    "A.clear()",
    "A.pop()",
    "A.sort(key=repr)",
    "A[0].append(V)",
    "A['k'].append(B)",
    "A['v'] = A",
    "A.append(A)",
    "del A",
    "del A[0]",
    "del A, B",
    "globals()['A'] = B",
    "globals()['A'].append(V)",
    "exec('A = [V]')",
    "exec('A.append(1)')",
    "(lambda g: g().update(A=V))(globals)",
    "A = vars()",
    "A = [V]\n1 / 0\nB = A",
    "A.append(2)\nundefined_name\nB = A",
    "for A in (V, [V]): B = A",
    "if (A := [V]): B = A",
    "try: raise ValueError(B)\nexcept ValueError as error: A = error",
    "A = [B for _ in range(3)]",
    "A = {B: i for i, B in enumerate('xy')}",
    "A = [B, B]; A[0] is A[1]",
    "B",
    "_",
    "A = str(V) * 40_000",
    "A = B = bytearray(50_000); A[3] = 7",
    "A[40_000] = 9",
    "from math import *\nA = floor(2.5)",
    "import math as A",
    "A = frozenset([1, (2, 'x')])",
    "A = iter([B, C, V]); next(A)",
    "next(A)",
    "A = (i for i in [V])",
    "A = object(); B = {'marker': A}",
    "B['marker'] is A",
    "A = slice(1, 2); B = range(3)",
)

FUNCTIONS = (
    "A = lambda v=B: v",
    "A = (lambda cell: lambda: cell)(B)",
    "A = [lambda: i for i in range(3)]",
    "A = [lambda i=i: (i, B) for i in range(2)]",
    "def A(x=[]):\n    x.append(V)\n    return x",
    "def A():\n    global B\n    B = [V]",
    "def A():\n    B.append(V)",
    "def A():\n    del globals()['B']",
    "def A():\n    return B()",
    "A()",
    "B = A()",
    "A[0]()",
    "A['x']()",
    "def make():\n    n = [0]\n    def up():\n        n[0] += 1\n        return n\n    def get(): return n\n"
    "    return up, get\n"
    "A, B = make()",
    "def make():\n    n = 0\n    def up():\n        nonlocal n\n        n += 1\n        return n\n    return up\n"
    "A = make(); A()",
    "def deco(f):\n    def inner(*a):\n        inner.calls += 1\n        return f(*a)\n    inner.calls = 0\n"
    "    return inner\n"
    "@deco\ndef A(x=1): return B",
    "A.note = B",
    "A.__defaults__ = (B,)",
    "A.__code__ = B.__code__",
    "import functools\nA = functools.partial(B, C)",
    "A = B.append",
    "def A(n): return n if n < 2 else A(n - 1)",
    "import functools\n@functools.wraps(B)\ndef A(*a): return B(*a)",
    "def A():\n    yield B",
    "A = list(B())",
    "import contextlib\n@contextlib.contextmanager\ndef A():\n    B.append(1)\n    yield C",
    "with A() as B: pass",
    "A = {}; exec('xs = []\\ndef f(): xs.append(1); return xs', A); B = A['f']",
    "A['xs'] = [V]",
    "import types\nA = types.ModuleType('made'); exec('xs = []\\ndef f(): return xs', A.__dict__); B = A.f",
    "A.xs = [V]",
)

CLASSES = (
    "class A:\n    x1 = B\n    def grow(self):\n        self.x2 = C\n        return self",
    "class A:\n    held = []\n    def grow(self):\n        type(self).held.append(1)\n        return self",
    "class A:\n    __slots__ = ('x1', 'x2')\n    def grow(self):\n        self.x3 = 1",
    "class A(dict):\n    def __init__(self, *a, **k):\n        super().__init__(*a, **k)\n        self.__dict__ = self",
    "class A:\n    shared = {}\n    def __init__(self):\n        self.__dict__ = self.shared",
    "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x1: int = 1\n"
    "    x2: list = dataclasses.field(default_factory=list)",
    "import dataclasses\n@dataclasses.dataclass(slots=True)\nclass A:\n    x1: object = None",
    "import dataclasses\n@dataclasses.dataclass\nclass A(B):\n    x4: int = 4",
    "class A(B):\n    x5 = C",
    "class A:\n    def __init__(self): self._v = [1]\n    @property\n    def x1(self): return self._v\n"
    "    @x1.setter\n    def x1(self, value): self._v = value",
    "import enum\nclass A(enum.Enum):\n    P = 1\n    Q = 2\n    R = 1\n    def __init__(self, n): self.log = [n]",
    "A = B.P; A.log.append(3)",
    "from typing import NamedTuple\nclass A(NamedTuple):\n    x1: object = 3",
    "A = B() if isinstance(B, type) else A",
    "A = [B(), B()]",
    "A = B().grow()",
    "A.grow()",
    "A.x1 = B",
    "A.x2 = [A]",
    "A.x2.append(V)",
    "type(A).x1 = V",
    "A.__class__.x9 = B",
    "del A.x1",
    "A.grow = lambda: C",
    "A.grow = B",
    "A = B.grow",
    "A = B.__dict__",
    "A['x7'] = V",
    "A.x7 = V",
    "A = type(B)",
    "A.__class__ = B",
    "import weakref\nA = weakref.ref(B)",
    "import weakref\nA = weakref.proxy(B)",
    "A().x1 = V",
    "import types\nA = types.SimpleNamespace(x1=B, x2=[C])",
    "import collections\nA = collections.deque([B, C], maxlen=2); B = A",
    "import collections\nA = collections.OrderedDict(x=B); A.move_to_end('x')",
    "import collections\nA = collections.defaultdict(list); A['x'].append(B)",
    "import dataclasses\nA = dataclasses.MISSING",
    "import collections\nA = collections.namedtuple('A', 'x1 x2')(B, C)",
)

OUTSIDE = (
    "import threading\ndef job():\n    A.append(V)\n"
    "thread = threading.Thread(target=job); thread.start(); thread.join()\n"
    "del job, thread",
    "import threading\nthread = threading.Thread(target=lambda: globals().update(A=[V]))\n"
    "thread.start(); thread.join(); del thread",
    "import threading, collections as box\ndef later(gate, over):\n    gate.wait(5)\n    try: A.append(8)\n"
    "    except Exception: pass\n    finally: over.set()\nbox.gate, box.over = threading.Event(), threading.Event()\n"
    "threading.Thread(target=later, args=(box.gate, box.over), daemon=True).start()\ndel later",
    "import collections as box\nif hasattr(box, 'gate'): box.gate.set(); box.over.wait(5); del box.gate, box.over",
    "import collections as box\nbox.kept = lambda: A.append(5)",
    "import collections as box\nbox.kept() if hasattr(box, 'kept') else None",
)

NUMPY = (
    "import numpy as np; A = np.arange(6.0)",
    "import numpy as np; A = np.zeros((300, 40)); B = A[::2, 1:]",
    "import numpy as np; A = np.asfortranarray(np.arange(6).reshape(2, 3)); B = A.T",
    "import numpy as np; A = np.zeros(3, dtype=[('i', int), ('o', object)]); A['o'][0] = B",
    "import numpy as np; A = np.zeros(3, dtype=[('i', int), ('f', float)]); B = A['f']",
    "import numpy as np; A = np.array([B, C, None], dtype=object)",
    "import numpy as np; A = np.lib.stride_tricks.sliding_window_view(np.arange(8), 3)",
    "import numpy as np; A = np.frombuffer(bytearray(b'12345678'), np.uint8)",
    "A = B[1:]",
    "A = B[...]",
    "A = B.T",
    "A = B.reshape(-1)",
    "A[0] = 7",
    "A[..., 0] += 1",
    "A[1:][0] = 3",
    "A['f'][1] = 2.5",
    "A.sort()",
    "A.flags.writeable = False",
    "A = B.copy()",
    "A *= 3",
    "A = memoryview(B)",
    "A.shape = (-1,)",
)

PANDAS = (
    "import pandas as pd; A = pd.DataFrame({'x': [1, 2, 3], 'y': [4.0, 5, 6], 'z': list('abc')})",
    "A = B['x']",
    "A = B[:]",
    "A = B[['x', 'y']]",
    "A = B.copy(deep=False)",
    "A = B.set_index('x')",
    "A = B.reset_index()",
    "A = B.T",
    "A.loc[0, 'x'] = 9",
    "A.iloc[0] = 8",
    "A['w'] = C",
    "A.drop(columns='y', inplace=True)",
    "A.rename(columns={'x': 'q'}, inplace=True)",
    "A = B.values",
    "A = B.index",
    "A.attrs['k'] = V",
    "import pandas as pd; A = pd.Series([1, 2, 3]); B = pd.Index(A)",
)

TORCH = (
    "import torch; A = torch.zeros(6)",
    "import torch; A = torch.arange(6.0).reshape(2, 3); B = A.t()",
    "import torch; A = torch.nn.Linear(2, 2, bias=False); torch.nn.init.ones_(A.weight); B = A.weight",
    "A = B[1:]",
    "A = B.view(-1)",
    "A[0] = 7",
    "A.mul_(2)",
    "A.requires_grad_()",
    "A = B.detach()",
    "A = B.numpy()",
    "A.add_(1)",
    "A.grad = B.clone()",
    "import torch\nwith torch.no_grad(): A.weight.add_(1)",
    "A.extra = B",
    "A.weight = B.weight",
)

CORE = (*BASIC, *FUNCTIONS, *CLASSES, *OUTSIDE)

_HOLE = re.compile(r"\b([ABCV])\b")


@st.composite
def cells(draw: st.DrawFn, *more: tuple[str, ...]) -> str:
    """One cell, of CORE or of one of `more`."""
    template = draw(st.sampled_from(draw(st.sampled_from([CORE, *more]))))
    filled = {hole: draw(st.sampled_from(NAMES)) for hole in "ABC"} | {"V": draw(st.sampled_from(VALUES))}
    return _HOLE.sub(lambda match: filled[match[1]], template)
