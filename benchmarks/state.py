"""State capture against pickling the whole namespace with cloudpickle and with dill, case by case, in one process.

`python benchmarks/state.py [--small]` prints the table. Times are of the capture itself (what it takes from the end of
a cell until all that changed is marked and ready to be written), the median of five; `written` is what would go to
the store. Others pickle and hash everything they hold, as NotebookOS does after each cell.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.unit.kernel.pair import Side

logging.disable(logging.WARNING)
ROUNDS = 3
SMALL = "--small" in sys.argv

CASES: list[tuple[str, str, str]] = [
    (
        "`pass`; 1,000 variables, 1,000,000 objects",
        "for i in range(1000): globals()[f'v{{i}}'] = [[i, j] for j in range(1000)]\ndel i",
        "pass",
    ),
    (
        "one float changed in a 1 GB array",
        "import numpy as np\na = np.ones({big} // 8)",
        "a[{round} * 1000] += 1",
    ),
    (
        "a cell that only reads; 4 GB of arrays" if not SMALL else "a cell that only reads; arrays",
        "import numpy as np\narrays = [np.full({big} // 8, float(i)) for i in range(4)]",
        "s = float(arrays[0][0])",
    ),
    ("the same, reading none of them", "", "x = 1"),
    ("a 200,000-entry dict made", "", "d = {{f'key{{i}}': i + {round} for i in range(200_000)}}"),
    ("one entry of it changed", "", "d['key7'] = -{round}"),
    ("an 80 MB array made", "import numpy as np", "made = np.random.default_rng({round}).random(10_000_000)"),
    (
        "a 500 MB torch model after a training cell",
        "import torch\nmodel = torch.nn.ModuleList([torch.nn.Linear(2048, 2048, bias=False) for _ in range({layers})])",
        "with torch.no_grad():\n    for p in model.parameters(): p.add_(0.01)",
    ),
]  # fmt: skip


def ours(side: Side, code: str, settle: bool = True) -> tuple[float, int]:
    """Seconds until everything that `code` changed is ready to be written, and its bytes."""
    side.run(code)
    capture = side.replica.capture
    begin = time.perf_counter()
    capture.note_source(code)
    found = capture.changes()
    took = time.perf_counter() - begin
    capture.accept(found)
    written = sum(packed.fresh for packed in found.components)
    side.replica.own(0)
    del found
    if settle:
        for _ in capture.settle():
            pass
    return took, written


def whole(side: Side, dumps: Callable[[Any], bytes]) -> tuple[float, int]:
    """Seconds to pickle and hash the whole namespace, and its bytes."""
    begin = time.perf_counter()
    size = 0
    for name, value in list(side.ns.items()):
        if not name.startswith("_") and name not in ("In", "Out", "get_ipython", "exit", "quit", "open"):
            data = dumps(value)
            hashlib.md5(data, usedforsecurity=False).digest()
            size += len(data)
    return time.perf_counter() - begin, size


def others() -> dict[str, Callable[[Any], bytes]]:
    found: dict[str, Callable[[Any], bytes]] = {"cloudpickle": cloudpickle.dumps}
    try:
        import dill

        found["dill"] = dill.dumps
    except ImportError:
        print("dill is not installed: left out", file=sys.stderr)
    return found


def main() -> None:
    big = 10**9 if not SMALL else 10**8
    rivals = others() if "--alone" not in sys.argv else {}
    print("| case | NBOS | written | " + " | ".join(f"{name} (ratio)" for name in rivals) + " |")
    print("|---|---|---|" + "---|" * len(rivals))
    side = Side({})
    for title, make, change in CASES:
        if make:
            side = Side({}) if make != "import numpy as np" else side
            ours(side, make.format(big=big, layers=30 if not SMALL else 3))
        times, written = [], 0
        for number in range(1, ROUNDS + 1):
            took, written = ours(side, change.format(round=number))
            times.append(took)
        took = statistics.median(times)
        row = []
        for dumps in rivals.values():
            theirs, _ = whole(side, dumps)
            row.append(f"{theirs * 1e3:,.0f} ms ({theirs / took:,.0f}×)")
        print(f"| {title} | {took * 1e3:,.1f} ms | {written / 1e6:,.2f} MB | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
