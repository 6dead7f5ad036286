"""Which bids a claim that was made ahead answers."""

from __future__ import annotations

import asyncio

import pytest

from gpu_daemon.ahead import ClaimAhead
from nbos_cluster.records import ClaimRecord

MINE = {"n": 5, "attempt": 1, "lease": 7, "epoch": 40}


async def made() -> ClaimAhead:
    timer = asyncio.get_running_loop().call_later(60, print)
    timer.cancel()
    return ClaimAhead(ClaimRecord(n=5, replica=0, host="a", ahead=True), token=44, lease=7, epoch=40, timer=timer)


async def test_it_answers_the_bid_that_it_was_made_for() -> None:
    assert (await made()).answers(**MINE)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"n": 6}, id="another number"),
        pytest.param({"attempt": 2}, id="a cell that ran before elsewhere"),
        pytest.param({"lease": 0}, id="a lease that may have ended"),
        pytest.param({"lease": 8}, id="another lease"),
        pytest.param({"epoch": 41}, id="other members since"),
        pytest.param({"epoch": 0}, id="a kernel that is not known any more"),
    ],
)
async def test_it_answers_nothing_else(other: dict[str, int]) -> None:
    assert not (await made()).answers(**{**MINE, **other})
