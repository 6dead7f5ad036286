"""The pure parts of `real_gpu.py`: the fit of l(t) = m/t + b, what SM numbers say about slices, rows of the table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """Seconds for t TPCs: m/t + b. error: the largest relative deviation of a sample from it."""

    m: float
    b: float
    error: float

    def at(self, tpcs: int) -> float:
        return self.m / tpcs + self.b


def fit(samples: Mapping[int, float]) -> Fit:
    """Least squares of seconds against 1/t, relative to each sample; neither m nor b below zero.

    samples: seconds by TPCs, at least two different numbers of TPCs.
    """
    if len(samples) < 2:
        raise ValueError(f"a fit needs two slices of different size, got {sorted(samples)}")
    rows = [(1 / (t * y), 1 / y) for t, y in samples.items()]  # m * (1/t)/y + b * 1/y = 1
    a, c = sum(x * x for x, _ in rows), sum(z * z for _, z in rows)
    d, e, f = sum(x * z for x, z in rows), sum(x for x, _ in rows), sum(z for _, z in rows)
    det = a * c - d * d
    m, b = (e * c - f * d) / det, (f * a - e * d) / det
    if b < 0:
        m, b = e / a, 0.0
    elif m < 0:
        m, b = 0.0, f / c
    error = max(abs((m / t + b) / y - 1) for t, y in samples.items())
    return Fit(m, b, error)


def smallest(fitted: Fit, most: int, slip: float) -> int:
    """The fewest TPCs that make it no more than `slip` times as slow as all `most` do (LithOS, 5.3)."""
    allowed = slip * fitted.at(most)
    return next((t for t in range(1, most + 1) if fitted.at(t) <= allowed * (1 + 1e-9)), most)


def expected_sms(tpcs: Collection[int]) -> int:
    return 2 * len(tpcs)


def confinement(seen: Mapping[str, Collection[int]], granted: Mapping[str, int]) -> list[str]:
    """What is wrong with the SM numbers that kernels saw. seen: by slice; granted: SMs of each. [] when all is well."""
    wrong = [
        f"slice {name}: kernels saw {len(set(seen[name]))} SMs, {granted[name]} were granted"
        for name in seen
        if len(set(seen[name])) > granted[name]
    ]
    names = sorted(seen)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            both = set(seen[one]) & set(seen[other])
            if both:
                wrong.append(f"slices {one} and {other} share {len(both)} SMs: {ranges(both)}")
    return wrong


def ranges(numbers: Collection[int]) -> str:
    """Numbers as people write them: 0-3, 8."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def slowdown(together: float, alone: float) -> str:
    """Throughput beside another, of that alone."""
    return f"{100 * together / alone:.0f} %" if alone > 0 else "-"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be in their section; a row of one cell is a section's heading."""
    sections: list[list[Sequence[str]]] = [[]]
    for row in rows:
        if len(row) == 1:
            sections.append([])
        sections[-1].append(row)
    return "\n".join(line for section in sections for line in _section(section))


def _section(rows: Sequence[Sequence[str]]) -> list[str]:
    body = [row for row in rows if len(row) > 1]
    widths = [max(len(cell) for cell in column) for column in zip(*body, strict=True)]
    heading = [f"\n{row[0]}" for row in rows if len(row) == 1]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in body]
    return heading + ["  " + "  ".join(row).rstrip() for row in cells]


def seconds(value: float) -> str:
    """A duration in a unit that fits."""
    if not math.isfinite(value):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.9995 * size:
            return f"{value / size:.2f} {unit}"
    return f"{value * 1e6:.1f} µs"
