"""A whole data-science notebook, end to end: NBOS with three replicas beside plain ipykernel.

`examples/bikes.ipynb` (47 cells: load, clean, plot, fit with pandas, matplotlib and scikit-learn) is run from its first
request to its last reply, on a new kernel each time, the sides in turns. Without `--think` a cell is sent as soon as
the one before is over, so that everything NBOS does between cells is paid for; with it a user looks at each output for
so many seconds, which count for nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from statistics import median

from direct import direct_nbos
from jupyter_client.blocking.client import BlockingKernelClient
from measure import ROOT, Running, Table, nbos_hub, ratio
from state_sides import plain, run

NOTEBOOK = ROOT / "examples" / "bikes.ipynb"
BAR = 1.025

Opened = contextlib.AbstractContextManager[BlockingKernelClient]


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def whole(opened: Opened, think: float) -> list[float]:
    """Seconds of each cell: request to reply and idle."""
    took = []
    with opened as client:
        run(client, "pass")
        for code in cells():
            began = time.perf_counter()
            run(client, code)
            took.append(time.perf_counter() - began)
            time.sleep(think)
    return took


def rounds(hub: Running, count: int, think: float) -> Iterator[tuple[list[float], list[float]]]:
    sides: list[Callable[[], Opened]] = [plain, lambda: direct_nbos(hub)]
    for number in range(count):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        found = {side: whole(sides[side](), think) for side in order}
        print(f"… round {number + 1}: plain {sum(found[0]):.2f} s, NBOS {sum(found[1]):.2f} s", flush=True)
        yield found[0], found[1]


def report(results: list[tuple[list[float], list[float]]], think: float) -> str:
    totals = [(sum(theirs), sum(ours)) for theirs, ours in results]
    theirs, ours = median(t for t, _ in totals), median(o for _, o in totals)
    pace = f"{think:g} s between cells" if think else "no pause between cells"
    table = Table(
        f"{NOTEBOOK.name}, {len(cells())} cells, {pace}, medians of {len(results)} runs, seconds",
        ("", "plain", "NBOS", "ratio", "bar"),
    )
    table.add("the whole notebook", f"{theirs:.2f}", f"{ours:.2f}", ratio(ours, theirs), f"< {BAR:g} ×")
    by_cell = []
    for number, code in enumerate(cells()):
        alone, with_us = (median(found[side][number] for found in results) for side in (0, 1))
        by_cell.append((with_us - alone, alone, with_us, code.splitlines()[0][:44]))
    for _, alone, with_us, title in sorted(by_cell, reverse=True)[:6]:
        table.add(title, f"{alone:.3f}", f"{with_us:.3f}", ratio(with_us, alone), "")
    return table.render()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--think", type=float, default=0.0, help="seconds between two cells")
    options = parser.parse_args()
    with nbos_hub() as hub:
        print(report(list(rounds(hub, options.rounds, options.think)), options.think))


if __name__ == "__main__":
    main()
