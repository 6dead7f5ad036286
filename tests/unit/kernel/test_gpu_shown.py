"""`%nbos gpu` says what a cell holds and by what, and calls cooperative what is."""

from __future__ import annotations

from dataclasses import replace

from nbos_kernel.gpu.confine import Held
from nbos_kernel.gpu.grants import Grant, Share
from nbos_kernel.gpu.shown import describe

SLICE = Share("GPU-a", 0, "H200", tuple(range(16)), 20 << 30, False, False, "green", "", 66)


def test_a_cell_without_a_grant_is_told_how_to_get_one() -> None:
    assert "%%gpu tpcs=16" in describe(None, ())


def test_a_slice_says_how_many_tpcs_are_held_and_that_it_can_be_left() -> None:
    text = describe(Grant("g", "h", 1, (SLICE,)), [Held("green", 15)])
    assert text.startswith("16 TPCs of 66, 20.0 GiB on H200 GPU-a; held to 15 TPCs by a green context under MPS")
    assert "cooperative" in text


def test_before_cuda_starts_the_host_s_offer_is_shown_with_its_reason() -> None:
    share = replace(SLICE, mechanism="cooperative", why="no MPS daemon runs here")
    text = describe(Grant("g", "h", 1, (share,)), ())
    assert "cooperative: processes take turns" in text
    assert text.endswith("(no MPS daemon runs here)")


def test_what_came_of_it_counts_more_than_the_offer() -> None:
    text = describe(Grant("g", "h", 1, (SLICE,)), [Held("cooperative", 0, "the driver is too old")])
    assert "green" not in text
    assert text.endswith("(the driver is too old)")


def test_whole_and_simulated_devices() -> None:
    whole, played = replace(SLICE, whole=True), replace(SLICE, simulated=True)
    first, second = describe(Grant("g", "h", 1, (whole, played)), ()).splitlines()
    assert "nobody else computes on it" in first
    assert "simulated" in second
