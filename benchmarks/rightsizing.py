"""Right-sizing on the simulated device: what capacity it frees, and what it costs, on a mix of twenty types of cells.

    python benchmarks/rightsizing.py [--runs 60] [--notebooks 10]

Each type is run in `--notebooks` notebooks of different users, `--runs` executions each, on the sizes that the daemon's
own `Rightsizer` advises, and as asked with the same random numbers, for comparison. Trials and checks count in both
numbers. Capacity is TPC-seconds held; each type counts the same. No clock is read: the table is the same everywhere.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.cell_types import CELLS, CellType  # noqa: E402
from benchmarks.simtable import Table, bar  # noqa: E402
from gpu_daemon.rightsizing import Key, Rightsizer  # noqa: E402
from nbos_cluster.simdevice import Device  # noqa: E402
from nbos_cluster.simdevice.parameters import ALLOWED_SLOWDOWN  # noqa: E402

FREED, SLOWER = 0.25, ALLOWED_SLOWDOWN


@dataclass(frozen=True)
class Result:
    """freed: share of the TPC-seconds as asked that was not held. slower: by how much the executions took longer."""

    cell: CellType
    tpcs: int
    freed: float
    slower: float
    why: str


def play(device: Device, cell: CellType, tpcs: int) -> float:
    """Seconds of one execution on a slice of `tpcs`, without noise."""
    device.open(cell.name, frozenset(range(tpcs)))
    began = device.now
    for kernel in cell.phases:
        device.launch(cell.name, kernel)
    while device.pending(cell.name):
        device.advance(device.next_at())
    device.close(cell.name)
    return device.now - began


def measure(cell: CellType, runs: int, seed: int) -> Result:
    device, sizer = Device(), Rightsizer(SLOWER)
    key = Key("ada", "simulated", cell.name, cell.asked)
    held = took = held_as_asked = took_as_asked = 0.0
    for run in range(runs):
        tpcs = sizer.advise(key).tpcs
        # The same disturbance for both: the difference is what right-sizing costs, not luck.
        seconds = cell.disturb(play(device, cell, tpcs), tpcs, run, Random(f"{seed} {cell.name} {run}"))
        asked = cell.disturb(play(device, cell, cell.asked), cell.asked, run, Random(f"{seed} {cell.name} {run}"))
        sizer.observe(key, tpcs, seconds)
        held, took = held + tpcs * seconds, took + seconds
        held_as_asked, took_as_asked = held_as_asked + cell.asked * asked, took_as_asked + asked
    advice = sizer.advise(key)
    return Result(cell, advice.tpcs, 1 - held / held_as_asked, took / took_as_asked - 1, advice.why)


def average(cell: CellType, runs: int, notebooks: int) -> Result:
    """Over several notebooks; the size and its reason are the first one's."""
    each = [measure(cell, runs, seed) for seed in range(1, notebooks + 1)]
    freed, slower = mean(r.freed for r in each), mean(r.slower for r in each)
    return Result(cell, each[0].tpcs, freed, slower, each[0].why)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="executions of each type in each notebook (60)")
    parser.add_argument("--notebooks", type=int, default=10, help="notebooks that run each type (10)")
    options = parser.parse_args()
    results = [average(cell, options.runs, options.notebooks) for cell in CELLS]
    table = Table(
        f"{len(CELLS)} types, {options.runs} executions in each of {options.notebooks} notebooks, "
        f"{SLOWER:.0%} slowdown allowed ('now' and 'why': the first notebook)",
        ("type", "asked", "now", "freed", "slower", "why"),
    )
    for r in results:
        table.add(r.cell.name, str(r.cell.asked), str(r.tpcs), f"{r.freed:.1%}", f"{r.slower:+.1%}", r.why)
    print(table.render(), "\n")
    freed, slower = mean(r.freed for r in results), mean(r.slower for r in results)
    print(bar("capacity freed", f"{freed:.1%}", f"≥ {FREED:.0%}", freed >= FREED))
    print(bar("slower", f"{slower:.1%}", f"≤ {SLOWER:.0%}", slower <= SLOWER))
    print(f"slowest type: {max(r.slower for r in results):.1%} slower, its trials included")


if __name__ == "__main__":
    main()
