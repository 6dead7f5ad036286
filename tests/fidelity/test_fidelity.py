"""Nothing comes back different from what it was without being named."""

from __future__ import annotations

from .table import run


def test_every_pair_is_the_same_or_named_as_lost() -> None:
    outcomes = run()
    assert len(outcomes) >= 200
    wrong = [each for each in outcomes if each.what == "different" or (each.what == "lost") != each.case.lost]
    assert wrong == []
