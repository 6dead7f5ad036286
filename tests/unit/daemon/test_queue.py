"""The fair queue: order between owners, the head's protection, positions and estimates."""

from __future__ import annotations

from gpu_daemon.ledger import GIB, Ledger, Request
from gpu_daemon.queue import Admit, Arrive, Ended, FairQueue, Instruction, Leave, Refuse
from gpu_daemon.simulated import simulated
from nbos_cluster.records import Resources


def queue(count: int = 2) -> FairQueue:
    return FairQueue(Ledger("h", simulated("h", count, "H200", tpcs=8, memory=8 * GIB)))


def arrive(name: str, now: float, owner: str = "ann", wait: bool = True, **resources: int) -> Arrive:
    return Arrive(Request(name, owner, "k-" + owner, 0, 1, Resources(**resources)), now, wait)


def admitted(instructions: list[Instruction]) -> list[str]:
    return [i.grant.grant for i in instructions if isinstance(i, Admit)]


def test_what_fits_goes_in_at_once() -> None:
    assert admitted(queue().handle(arrive("a", 0, gpus=1))) == ["a"]


def test_who_does_not_wait_is_refused_with_the_reason_and_not_queued() -> None:
    q = queue()
    q.handle(arrive("a", 0, gpus=2))
    out = q.handle(arrive("b", 1, gpus=1, wait=False))
    assert [(i.grant, i.code) for i in out if isinstance(i, Refuse)] == [("b", "busy")]
    assert len(q) == 0


def test_within_an_owner_first_come_first_served() -> None:
    q = queue(1)
    for at, name in enumerate("abcd"):
        q.handle(arrive(name, at, gpus=1))
    served = [admitted(q.handle(Ended(name, 10 + at))) for at, name in enumerate("abc")]
    assert served == [["b"], ["c"], ["d"]]


def test_the_owner_who_used_less_goes_first() -> None:
    q = queue(1)
    q.handle(arrive("a1", 0, gpus=1))
    q.handle(arrive("a2", 1, gpus=1))
    q.handle(Leave("a2", 2))
    q.handle(arrive("big", 100, gpus=1, owner="ann"))
    q.handle(arrive("small", 101, gpus=1, owner="bob"))
    # `big` was first in a queue of one, and whoever is first stays so; behind it the rule holds.
    q.handle(arrive("big2", 102, gpus=1, owner="ann"))
    assert q.order(103) == ["big", "small", "big2"]


def test_a_small_request_does_not_pass_on_the_devices_kept_for_the_head() -> None:
    q = queue(2)
    q.handle(arrive("slice", 0, tpcs=4))
    q.handle(arrive("whole", 1, gpus=2))
    assert admitted(q.handle(arrive("little", 2, tpcs=1))) == []
    assert admitted(q.handle(Ended("slice", 3))) == ["whole"]


def test_a_small_request_goes_in_right_after_the_head_has_its_device() -> None:
    q = queue(2)
    q.handle(arrive("x", 0, tpcs=8))
    q.handle(arrive("y", 0, tpcs=4))
    assert admitted(q.handle(arrive("whole", 1, gpus=1))) == []
    # The head waits for the device of `y`, which is nearer to being free; nothing else may take it.
    assert admitted(q.handle(arrive("little", 2, tpcs=1))) == []
    assert admitted(q.handle(Ended("x", 3))) == ["whole", "little"]


def test_a_small_request_passes_on_a_device_that_the_head_does_not_wait_for() -> None:
    q = queue(2)
    q.handle(arrive("x", 0, tpcs=6))
    q.handle(arrive("y", 0, tpcs=4))
    q.handle(arrive("head", 1, tpcs=8))
    # The head is kept the device of `y`; the room beside `x` is free for all.
    assert admitted(q.handle(arrive("little", 2, tpcs=2))) == ["little"]


def test_positions_reasons_and_estimates_are_told_at_each_change() -> None:
    q = queue(1)
    q.handle(arrive("first", 0, gpus=1))
    q.handle(Ended("first", 60))
    q.handle(arrive("second", 100, gpus=1))
    q.handle(arrive("third", 110, gpus=1))
    assert q.stale
    (tell,) = q.news(110)
    assert (tell.position, tell.of, tell.estimate) == (1, 1, 50.0)
    q.handle(arrive("fourth", 120, gpus=1))
    assert [(t.grant, t.position, t.of, t.estimate) for t in q.news(120)] == [
        ("third", 1, 2, 40.0),
        ("fourth", 2, 2, 100.0),
    ]
    q.handle(Leave("third", 130))
    assert [(t.grant, t.position) for t in q.news(130)] == [("fourth", 1)]
    assert q.news(131) == []
    assert not q.stale


def test_a_grant_whose_claim_was_lost_teaches_nothing() -> None:
    q = queue(1)
    q.handle(arrive("a", 0, gpus=1))
    q.handle(Ended("a", 50, used=False))
    assert q.expected("ann", "k-ann") is None


def test_what_became_impossible_leaves_the_queue() -> None:
    q = queue(1)
    q.handle(arrive("a", 0, gpus=1))
    q.handle(arrive("b", 1, gpus=1))
    q.ledger.set_health(q.ledger.devices[0].uuid, False, "broken")
    out = q.handle(Ended("a", 2))
    assert [(i.grant, i.code) for i in out if isinstance(i, Refuse)] == [("b", "impossible")]
