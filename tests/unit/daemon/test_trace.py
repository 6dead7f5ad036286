"""Cells with the lengths and sizes of production notebooks through ledger and queue, without a violation.

`python benchmarks/trace.py PATH` does the same with the trace itself.
"""

from __future__ import annotations

from gpu_daemon.order import Policy
from gpu_daemon.shares import read_shares
from tests.unit.daemon.replay import Replay, made_up


def test_a_crowded_month_goes_through_without_a_violation() -> None:
    shares = read_shares({"users": {"s1": {"devices": 8}, "s2": {"priority": 3}, "s3": {"weight": 4}}})
    out = Replay(24, Policy(shares)).run(made_up(30, 50))
    assert (out.cells, out.refused) == (1500, 0)
    assert max(out.waits) > 0, "it was crowded"
    assert abs(out.held - out.accounted) < 1


def test_with_room_for_all_nobody_waits() -> None:
    assert max(Replay(8 * 30).run(made_up(30, 20)).waits) == 0
