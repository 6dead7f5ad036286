"""Tables of the benchmarks on the simulated device. Unlike `measure.py` they name no machine: they depend on none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """Plain text, columns as wide as they need to be; the first and a `why` are text, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)

    def render(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = ["  ".join(self._aligned(cell, widths[i], i) for i, cell in enumerate(line)).rstrip() for line in lines]
        return "\n".join([self.title, "", text[0], "  ".join("-" * width for width in widths), *text[1:]])

    def _aligned(self, cell: str, width: int, column: int) -> str:
        text = column == 0 or self.columns[column] == "why"
        return cell.ljust(width) if text else cell.rjust(width)


def bar(what: str, measured: str, limit: str, met: bool) -> str:
    return f"{what}: {measured}, bar {limit}: {'met' if met else 'MISSED'}"
