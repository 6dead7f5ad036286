"""Cells that change the namespace: every way Python and IPython know, each with a probe of what it did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """`setup` and `change` are cells; `probe` is an expression that must give the same on every replica."""

    setup: str
    change: str
    probe: str


CASES = {
    "plain": Case(
        ("a1 = 1"),
        ("a1 = 2"),
        ("a1"),
    ),
    "augmented": Case(
        ("a2 = [1]; a2b = a2"),
        ("a2 += [2]"),
        ("(a2, a2b, a2 is a2b)"),
    ),
    "annotated": Case(
        ("a3: int = 1"),
        ("a3: int = 2\na3b: str"),
        ("(a3, __annotations__['a3'])"),
    ),
    "unpacked": Case(
        ("pass"),
        ("a4, *b4 = (c4, d4) = [1, 2] and (1, 2)"),
        ("(a4, b4, c4, d4)"),
    ),
    "walrus": Case(
        ("pass"),
        ("if (a5 := 7) > 3: pass\n[b5 := i for i in range(3)]"),
        ("(a5, b5)"),
    ),
    "loop": Case(
        ("pass"),
        ("for a6 in range(4):\n    with open('/dev/null') as b6: pass"),
        ("(a6, b6.closed)"),
    ),
    "caught": Case(
        ("pass"),
        ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    a7 = str(e)"),
        ("(a7, 'e' in globals())"),
    ),
    "matched": Case(
        ("pass"),
        ("match {'x': [1, 2]}:\n    case {'x': [a8, *b8]}: pass"),
        ("(a8, b8)"),
    ),
    "deleted": Case(
        ("a9 = b9 = [1]"),
        ("del a9"),
        ("('a9' in globals(), b9)"),
    ),
    "attribute": Case(
        ("import types; o10 = types.SimpleNamespace(x=1)"),
        ("o10.x = 2; o10.y = []; del o10.x"),
        ("vars(o10)"),
    ),
    "item": Case(
        ("a11 = {'k': [1, 2, 3]}"),
        ("a11['k'][0:2] = [9]; a11['n'] = a11['k']"),
        ("(a11, a11['n'] is a11['k'])"),
    ),
    "async def": Case(
        ("pass"),
        ("async def f12(x):\n    return x + a1"),
        ("__import__('inspect').iscoroutinefunction(f12)"),
    ),
    "conditional def": Case(
        ("pass"),
        ("if True:\n    def f13(): return 'yes'\nelse:\n    def f13(): return 'no'"),
        ("f13()"),
    ),
    "decorated": Case(
        (
            "import functools\n"
            "def twice(f):\n"
            "    @functools.wraps(f)\n"
            "    def inner(*a): return 2 * f(*a)\n"
            "    return inner"
        ),
        ("@twice\ndef f14(n):\n    'Doc.'\n    return n"),
        ("(f14(4), f14.__name__, f14.__doc__)"),
    ),
    "default argument": Case(
        ("def f15(x, seen=[]):\n    seen.append(x); return len(seen)"),
        ("f15(1); f15(2)"),
        ("f15(0) > 2"),
    ),
    "closure": Case(
        ("def make():\n    n = 0\n    def up():\n        nonlocal n; n += 1; return n\n    return up, lambda: n"),
        ("up16, see16 = make(); up16(); up16()"),
        ("see16()"),
    ),
    "class": Case(
        ("class C17:\n    kind = 'old'\n    def name(self): return self.kind\nc17 = C17()"),
        ("C17.kind = 'new'; C17.shout = lambda self: self.name().upper()"),
        ("(c17.shout(), type(c17) is C17)"),
    ),
    "import in try": Case(
        ("pass"),
        ("try:\n    import nothing_there\nexcept ImportError:\n    import json as m18"),
        ("m18.__name__"),
    ),
    "from import": Case(
        ("pass"),
        ("from collections import OrderedDict as O19, deque\nimport xml.dom.minidom"),
        ("(O19.__name__, xml.dom.minidom.__name__)"),
    ),
    "alias": Case(
        ("a20 = {'x': [1]}; b20 = a20['x']"),
        ("b20.append(2)"),
        ("(a20, a20['x'] is b20)"),
    ),
    "through a function": Case(
        ("a21 = 0; l21 = []\ndef f21():\n    global a21, new21\n    a21 += 5; new21 = 'made'; l21.append(a21)"),
        ("f21(); f21()"),
        ("(a21, new21, l21)"),
    ),
    "globals()": Case(
        ("pass"),
        ("globals()['a22'] = 1; globals().update(b22=[1], c22=2); globals().pop('c22')"),
        ("(a22, b22, 'c22' in globals())"),
    ),
    "exec and setattr": Case(
        ("import __main__"),
        ("exec('a23 = 4'); setattr(__main__, 'b23', 5); get_ipython().push({'c23': 6})"),
        ("(a23, b23, c23)"),
    ),
    "magics": Case(
        ("pass"),
        ("%time a24 = 3\nb24 = !echo hi\n%xmode Context"),
        ("(a24, list(b24))"),
    ),
    "cell magic": Case(
        ("pass"),
        ("%%capture c25\na25 = 1\nprint('kept')"),
        ("(a25, c25.stdout)"),
    ),
    "cycle": Case(
        ("a26 = []; b26 = {'a': a26}"),
        ("a26.append(b26)"),
        ("(a26[0] is b26, b26['a'] is a26)"),
    ),
    "numpy view": Case(
        ("import numpy as np; a27 = np.arange(10); b27 = a27[2:5]"),
        ("b27[:] = 0"),
        ("(a27.tolist(), np.shares_memory(a27, b27))"),
    ),
    "numpy large": Case(
        ("a28 = np.zeros((500, 500)); b28 = a28.T"),
        ("a28[1, 2] = 7"),
        ("(b28[2, 1], np.shares_memory(a28, b28), a28.flags.writeable)"),
    ),
    "pandas": Case(
        ("import pandas as pd; d29 = pd.DataFrame({'x': [1, 2]})"),
        ("d29['y'] = d29.x * 2; d29.loc[0, 'x'] = 9"),
        ("d29.to_dict('list')"),
    ),
    "generator state": Case(
        ("import random; r30 = random.Random(4); g30 = np.random.default_rng(4)"),
        ("r30.random(); g30.random()"),
        ("(r30.getstate()[1][-1], str(g30.bit_generator.state))"),
    ),
    "builtin types": Case(
        ("import collections, datetime, decimal, re"),
        (
            "a31 = [{1}, frozenset([2]), b'x', bytearray(b'y'), 3j, ..., range(3), slice(1), re.compile('x')]\n"
            "a31 += [datetime.date(2026, 1, 2), decimal.Decimal('1.5'), collections.Counter('aab')]"
        ),
        ("a31"),
    ),
    "dataclass and enum": Case(
        (
            "import dataclasses, enum\n"
            "@dataclasses.dataclass\n"
            "class D32:\n"
            "    x: int = 0\n"
            "class E32(enum.Enum):\n"
            "    RED = 1"
        ),
        ("d32 = D32(4); e32 = E32.RED"),
        ("(d32 == D32(4), repr(d32), e32 is E32.RED)"),
    ),
    "tensor": Case(
        ("import torch; t33 = torch.zeros(4); v33 = t33[1:]; m33 = torch.nn.Linear(2, 1)"),
        ("v33 += 1; w33 = m33.weight"),
        ("(t33.tolist(), w33 is m33.weight)"),
    ),
    "error in the cell": Case(
        ("a34 = 1; l34 = []"),
        ("l34.append(1); a34 = 2"),
        ("(a34, l34)"),
    ),
}
