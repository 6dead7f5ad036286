"""Nothing comes back different from what it was without being named."""

from __future__ import annotations

from .table import run, take_over


def test_every_pair_is_the_same_or_named_as_lost() -> None:
    outcomes = run()
    assert len(outcomes) >= 200
    wrong = [each for each in outcomes if each.what == "different" or (each.what == "lost") != each.case.lost]
    assert wrong == []


def test_loading_on_first_use_shows_what_loading_everything_shows() -> None:
    """On a `lazy` kernel with a threshold of one byte nothing is loaded when the replica takes over."""
    pairings = take_over()
    assert sum(1 for each in pairings if each.lazy["left"]) >= 200
    assert {each.case.make: each.differences() for each in pairings if each.differences()} == {}
