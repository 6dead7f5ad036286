"""What every benchmark shares: the two sides, started on the same machine in the same run, and a table of
both.

A benchmark asserts nothing about time: it prints what it measured beside the bar.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.system.sides import PLAIN_KERNEL, Running, nbos_hub, scratch, stock_hub  # noqa: E402

__all__ = [
    "PLAIN_KERNEL",
    "Running",
    "Table",
    "machine",
    "nbos_hub",
    "percentile",
    "ratio",
    "scratch",
    "stock_hub",
]


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(percent / 100 * len(ordered) + 0.5) - 1))]


def ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f} ×" if ours and theirs else "–"


@dataclass
class Table:
    """Plain text, columns as wide as they need to be; the first is text, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)

    def render(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = ["  ".join(_aligned(cell, widths[i], i) for i, cell in enumerate(line)) for line in lines]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, machine(), "", text[0], rule, *text[1:]])


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    load = os.getloadavg()[0]
    cores = psutil.cpu_count()
    when = time.strftime("%Y-%m-%d %H:%M")
    return f"{when}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}, load {load:.1f}"
