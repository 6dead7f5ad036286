"""A month of training cells of production notebooks through the very ledger and queue of the daemon, in virtual time.

Every step is checked: the ledger's accounts (promise 3), the queue's, and the accounting: what was granted adds up to
the second. Prints how long cells waited, how busy the devices were, and what a decision cost.

    python benchmarks/trace.py [PATH] [--devices 256]

PATH is notebook-training-june.csv: github.com/ds2-lab/NotebookOS-Dashboard,
driver-backend/scripts/tiresias_generator/sensei_june_60sec.csv (not part of this project). Its rows are grouped by
session; a drop in submit_time starts the next. A session is a user with a kernel here, whose next cell is submitted
when the one before has ended. Without PATH a month is made up with the trace's numbers of GPUs and its durations.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

from measure import ROOT, Table, percentile

from tests.unit.daemon.replay import MINUTE, Cell, Replay, made_up

assert ROOT  # measure puts this tree on the path


def read(path: Path) -> Iterator[Cell]:
    session, before = 0, float("-inf")
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            at = float(row["submit_time"])
            session += at < before
            before = at
            yield Cell(f"s{session}", at * MINUTE, int(row["num_gpu"]), max(1.0, float(row["duration"]) * MINUTE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, help="the trace")
    parser.add_argument("--devices", type=int, nargs="*", default=[192, 256, 384])
    options = parser.parse_args()
    table = Table(
        "a month of cells; minutes waited, share of devices held, CPU microseconds a decision",
        (
            "devices",
            "cells",
            "wait p50",
            "p95",
            "p99",
            "max",
            "busy",
            "device-hours",
            "decision p50",
            "p99",
            "violations",
        ),
    )
    for devices in options.devices:
        cells = read(options.path) if options.path else made_up(337, 90)
        out = Replay(devices).run(cells)
        waits = [f"{percentile(out.waits, p) / MINUTE:.1f}" for p in (50, 95, 99, 100)]
        costs = [f"{percentile(out.decisions, p):.0f}" for p in (50, 99)]
        busy = f"{out.held / (devices * out.span):.1%}"
        # A violation ends the run with its story.
        table.add(str(devices), str(out.cells), *waits, busy, f"{out.held / 3600:.0f}", *costs, "0")
    print(table.render())


if __name__ == "__main__":
    main()
