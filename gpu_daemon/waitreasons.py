"""Why somebody waits although there is room, or behind somebody who came later: sentences for people. No IO."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_daemon.order import FAIR, GUARANTEED, OVERDUE, TURN, Rank
from gpu_daemon.reservations import Reservation

_CLASSES = {
    TURN: "a cell that has waited for very long goes first",
    GUARANTEED: "cells within a guaranteed quota go first",
    OVERDUE: "cells that have waited for very long go first",
}


def reserved(host: str, keeping: Sequence[Reservation], bound: float) -> str:
    names = " and ".join(r.text for r in keeping)
    return (
        f"the free room on host {host} is kept for the course {names}, and a cell of this kernel may take "
        f"{duration(bound)}"
    )


def passed_by(first: Rank, own: Rank, used: float) -> str:
    """`first`, who came later, goes before `own`, whose owner used so many device-seconds in the last day."""
    if first[0] != own[0]:
        return "; " + _CLASSES[first[0]]
    if first[0] == FAIR and first[1] != own[1]:
        return "; cells of a higher priority go first"
    if first[0] == FAIR and first[3] < own[3]:
        return f"; users who had less go first (you used {used / 3600:.1f} GPU-hours in the last day)"
    return ""


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def coming_back(host: str, within: float) -> str:
    return f"its room on host {host} is on loan to other cells, which are giving it back (within {duration(within)})"


def owed_to_others(host: str, borrow: int | None) -> str:
    owed = f"the free room on host {host} is owed to others' quotas and only lent, TPCs without memory"
    if borrow is not None and borrow < 0:
        return f"{owed}; this cell does not borrow: leave out borrow=no, or ask for less"
    return f"{owed}; there are not as many TPCs, or not as much memory that is owed to nobody: ask for less"
