"""The benchmarks on the simulated device say the same on every machine, so a short form of them is a test."""

from __future__ import annotations

from statistics import mean

from benchmarks import rightsizing, sharing
from benchmarks.cell_types import CELLS


def test_an_important_tenant_hardly_feels_a_borrower_and_the_device_is_used() -> None:
    results = sharing.measure(4.0, seed=1)
    assert results == sharing.measure(4.0, seed=1)
    alone, equal, ours = (results[way] for way in ("important alone", "equal sharing", sharing.OURS))
    assert ours.p99 <= sharing.TAIL * alone.p99
    assert ours.own <= sharing.TAIL * alone.own
    assert ours.use >= sharing.USE * equal.use
    assert ours.work >= sharing.USE * equal.work
    # What the others lack is why stealing is worth its trouble.
    assert results["quotas"].use < 0.8 * equal.use
    assert min(results[way].own for way in ("time slicing", "equal sharing")) > 1.15 * alone.own


def test_rightsizing_frees_a_quarter_of_the_capacity_at_little_cost() -> None:
    results = [rightsizing.average(cell, runs=60, notebooks=4) for cell in CELLS]
    assert mean(r.freed for r in results) >= rightsizing.FREED
    assert mean(r.slower for r in results) <= rightsizing.SLOWER
    assert max(r.slower for r in results) < 0.12
