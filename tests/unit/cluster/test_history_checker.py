"""The checker of tests/cluster sees what it is there for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.cluster.history import Sent, problems
from tests.system.channels import Cell, Result
from tests.system.messages import Message


def state(name: str) -> Message:
    return Message("iopub", {"msg_type": "status"}, {}, {}, {"execution_state": name})


def sent(number: int, reply: dict[str, Any], states: tuple[str, ...] = ("busy", "idle")) -> Sent:
    result = Result(reply, tuple(state(name) for name in states), 0.0, 0.0, 0.0)
    return Sent(number, Cell(str(number), 0.0, f"cell {number}"), result)


def ok(number: int) -> Sent:
    return sent(number, {"status": "ok", "execution_count": number})


def own(number: int) -> Sent:
    return sent(number, {"status": "error", "ename": "ZeroDivisionError", "evalue": "", "execution_count": number})


def died(number: int) -> Sent:
    return sent(number, {"status": "error", "ename": "NBOSReplicaDied", "evalue": "", "execution_count": number})


def undoing(number: int) -> Sent:
    """It tells that the cell before is undone."""
    one = ok(number)
    text = "NBOS: replica 1 was lost before the changes of the previous cell were stored (…)"
    note = Message("iopub", {"msg_type": "stream"}, {}, {}, {"name": "stderr", "text": text})
    assert one.result is not None
    one.result = replace(one.result, messages=(*one.result.messages, note))
    return one


def lost(number: int) -> Sent:
    return sent(number, {"status": "error", "ename": "NBOSReplyLost", "evalue": ""})


LOG = [(1, "cell 1"), (2, "cell 2"), (3, "cell 3")]


def test_a_right_history_has_no_problem() -> None:
    assert problems([ok(1), own(2), died(3), ok(4)], [1, 2, 4], 7, [*LOG[:2], (4, "cell 4")]) == []
    assert problems([ok(1), undoing(2)], [2], 2, LOG[1:]) == []
    assert problems([lost(1)], [1], 1, LOG) == problems([lost(1)], [], 0, []) == []


@pytest.mark.parametrize(
    ("history", "ran", "total", "log", "said"),
    [
        ([ok(1), ok(2)], [1], 1, LOG, "cell 2 was answered ok  and ran 0 times"),
        ([ok(1), undoing(2)], [1, 2], 3, LOG, "cell 1 was answered ok  and ran 1 times"),
        ([undoing(1), ok(2)], [2], 2, LOG[1:], "cell 1 was answered ok  and ran 0 times"),
        ([ok(1)], [1, 1], 2, LOG, "ran 2 times"),
        ([died(1)], [1], 1, LOG, "ran 1 times"),
        ([lost(1)], [1, 1], 2, LOG, "ran 2 times"),
        ([lost(1)], [1], 1, [], "in the log: []"),
        ([own(1)], [], 0, LOG, "ran 0 times"),
        ([ok(1), ok(2)], [2, 1], 3, LOG, "in the order"),
        ([ok(1)], [1], 0, LOG, "torn state"),
        ([ok(1)], [1, 9], 10, LOG, "nobody sent"),
        ([ok(1)], [1], 1, [], "in the log: []"),
        ([ok(1)], [1], 1, [(1, "cell 1"), (2, "cell 1")], "in the log: [1, 2]"),
        ([ok(1)], [1], 1, [(5, "cell 1")], "in the log: [5]"),
        ([sent(1, {"status": "ok", "execution_count": 1}, ("busy", "idle", "idle"))], [1], 1, LOG, "was told as"),
    ],
)
def test_what_is_wrong_is_named(
    history: list[Sent], ran: list[int], total: int, log: list[tuple[int, str]], said: str
) -> None:
    assert any(said in problem for problem in problems(history, ran, total, log))


def test_a_cell_without_an_answer_is_named() -> None:
    assert problems([Sent(1, Cell("1", 0.0, "cell 1"))], [], 0, []) == ["cell 1 was never answered"]
