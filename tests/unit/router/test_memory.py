"""When the router gives memory back: the clock is what the test says."""

from __future__ import annotations

from nbos_provisioner.memory import AT_LAST, CALM, Memory


class Given:
    def __init__(self) -> None:
        self.times = 0
        self.memory = Memory(self._trim)

    def _trim(self) -> None:
        self.times += 1


def test_it_is_given_back_once_when_nothing_happens_any_more() -> None:
    given = Given()
    given.memory.busy(10.0)
    given.memory.calm(10.0 + CALM / 2)
    assert given.times == 0
    assert given.memory.due == 10.0 + CALM
    given.memory.calm(10.0 + CALM)
    given.memory.calm(100.0)
    assert (given.times, given.memory.due) == (1, None)


def test_a_cell_that_prints_on_for_ever_does_not_keep_it() -> None:
    given = Given()
    now, steps = 10.0, round(2.5 * AT_LAST / (CALM / 4))
    for _ in range(steps):
        given.memory.busy(now)
        given.memory.calm(now)
        now += CALM / 4
    assert given.times == 2


def test_nothing_is_due_where_nothing_can_be_given_back() -> None:
    memory = Memory(None)
    memory.busy(1.0)
    memory.calm(100.0)
    assert memory.due is None
