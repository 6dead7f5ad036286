"""How a cell's duration depends on its TPCs: l(t) = m/t + b seconds (LithOS, SOSP'25), fitted to what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Fit:
    """l(t) = m/t + b; error: its largest relative error at a size that was measured."""

    m: float
    b: float
    error: float

    def seconds(self, tpcs: float) -> float:
        return self.m / tpcs + self.b

    def smallest(self, asked: int, slowdown: float) -> int:
        """The smallest size that is slower than `asked` by at most `slowdown`, as the model says."""
        most = (1 + slowdown) * self.seconds(asked)
        if self.m <= 0:
            return 1
        return min(asked, max(1, ceil(self.m / (most - self.b) - 1e-9))) if most > self.b else asked


def fit(points: Iterable[tuple[int, float]]) -> Fit | None:
    """Least squares of the relative errors over (TPCs, seconds), with m and b not negative; None below two sizes."""
    known = [(t, s) for t, s in points if t > 0 and s > 0]
    if len({t for t, _ in known}) < 2:
        return None
    # Dividing each equation m/t + b = s by s makes the error relative.
    rows = [(1 / (t * s), 1 / s) for t, s in known]
    xx, xy, yy = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = sum(r[0] for r in rows), sum(r[1] for r in rows)
    det = xx * yy - xy * xy
    m, b = ((x * yy - y * xy) / det, (y * xx - x * xy) / det) if det > 1e-12 * xx * yy else (0.0, y / yy)
    if m < 0:
        m, b = 0.0, y / yy
    elif b < 0:
        m, b = x / xx, 0.0
    return Fit(m, b, max(abs((m / t + b) / s - 1) for t, s in known))
