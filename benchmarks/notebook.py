"""A whole data-science notebook, end to end: NBOS beside plain ipykernel.

`examples/bikes.ipynb` (47 cells: load, clean, plot, fit with pandas, matplotlib and scikit-learn) is run from its first
request to its last reply, on a new kernel each time, the sides in turns. Without `--think` a cell is sent as soon as
the one before is over, so that everything NBOS does between cells is paid for; with it a user looks at each output for
so many seconds, which count for nobody. With three replicas on one machine the two standbys, which import and load
all that the executor does, take processor time from it that they would not take on hosts of their own: on few cores,
`--replicas 1` tells the two apart.

The host learns what its kernels import, and imports it ahead (docs/warm.md): the first round is *cold*, nothing is
learnt; before each later one the benchmark waits until the hosts have imported ahead what they want to, and names it.
Cold and warm rounds are reported apart. `--no-learning` has only cold ones. The ratio of whole notebooks is the median
of the rounds' ratios; on machines whose speed wavers (virtual ones) the sum of each cell's fastest run tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from direct import direct_nbos
from jupyter_client.blocking.client import BlockingKernelClient
from measure import ROOT, Running, Table, nbos_hub, ratio
from state_sides import plain, run

from tests.system.nbosenv import nbos_status

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


@dataclass(frozen=True)
class Round:
    """ahead: modules that every host had imported ahead when the kernel was asked for."""

    plain: list[float]
    nbos: list[float]
    ahead: tuple[str, ...]


def imported_ahead(hub: Running) -> tuple[str, ...]:
    found = [set(warm["modules"]) for host in nbos_status(hub.directory)["hosts"] for warm in host["warm"]]
    return tuple(sorted(set.intersection(*found))) if found else ()


def settled(hub: Running, still: float = 25.0, timeout: float = 240.0) -> None:
    """Until no host has anything new for `still` seconds, and each has as many warm replicas as it wants."""
    deadline, since, seen = time.monotonic() + timeout, time.monotonic(), ""
    while time.monotonic() < deadline and time.monotonic() < since + still:
        pools = [warm for host in nbos_status(hub.directory)["hosts"] for warm in host["warm"]]
        full = all(warm["ready"] >= warm["wanted"] and warm["modules"] for warm in pools)
        if not full or str(pools) != seen:
            since, seen = time.monotonic(), str(pools)
        time.sleep(0.5)


def rounds(hub: Running, count: int, think: float, replicas: int, learn: bool) -> Iterator[Round]:
    sides: list[Callable[[], Opened]] = [plain, lambda: direct_nbos(hub, replicas)]
    for number in range(count):
        if number and learn:
            settled(hub)
        ahead = imported_ahead(hub)
        order = (0, 1) if number % 2 == 0 else (1, 0)
        found = {side: whole(sides[side](), think) for side in order}
        state = "warm" if ahead else "cold"
        print(f"… round {number + 1}, {state}: plain {sum(found[0]):.2f} s, NBOS {sum(found[1]):.2f} s", flush=True)
        print(f"  imported ahead: {', '.join(ahead) or 'nothing'}", flush=True)
        yield Round(found[0], found[1], ahead)


def report(name: str, rounds: list[Round], think: float, replicas: int) -> str:
    results = [(one.plain, one.nbos) for one in rounds]
    totals = [(sum(theirs), sum(ours)) for theirs, ours in results]
    theirs, ours = median(t for t, _ in totals), median(o for _, o in totals)
    paired = median(o / t for t, o in totals)  # both of a round ran when the machine was about as fast
    pace = f"{replicas} replicas, " + (f"{think:g} s between cells" if think else "no pause between cells")
    table = Table(
        f"{NOTEBOOK.name}, {len(cells())} cells, {pace}, {name}, medians of {len(results)} runs, seconds",
        ("", "plain", "NBOS", "ratio", "bar"),
    )
    table.add("the whole notebook", f"{theirs:.2f}", f"{ours:.2f}", f"{paired:.2f} ×", f"< {BAR:g} ×")
    fastest = [sum(map(min, zip(*(found[side] for found in results), strict=True))) for side in (0, 1)]
    table.add("… each cell's fastest run", *(f"{took:.2f}" for took in fastest), ratio(fastest[1], fastest[0]), "")
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
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--no-learning", dest="learn", action="store_false", help="nothing is imported ahead")
    options = parser.parse_args()
    # As many hosts as replicas: the next kernel starts where the one before was learnt from.
    given = ["--hosts", str(options.replicas), *([] if options.learn else ["--no-learning"])]
    with nbos_hub(options=given) as hub:
        results = list(rounds(hub, options.rounds, options.think, options.replicas, options.learn))
    for name, warm in (("cold (nothing learnt)", False), ("warm (modules imported ahead)", True)):
        if some := [one for one in results if bool(one.ahead) == warm]:
            print(report(name, some, options.think, options.replicas), end="\n\n")


if __name__ == "__main__":
    main()
