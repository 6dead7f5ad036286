"""Real replica processes of a `lazy` kernel, against a daemon that answers from memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .fake_daemon import FakeDaemon, Kernel
from .test_kernel_process import ENDS, daemon, start, until

__all__ = ["daemon", "start"]

MAKE = "import numpy as np\nalpha = np.full(500_000, 1.0)\nbeta = np.full(500_000, 2.0)\ndef used(): return beta[0]"


@pytest.fixture
def moved(daemon: FakeDaemon, start: Callable[[int], Kernel]) -> Kernel:
    """The second replica, after the first one made two arrays and died."""
    daemon.lazy = 1_000_000
    first, second = start(0).ready(), start(1).ready()
    first.run(MAKE, 1)
    until(lambda: daemon.applied.get(1) == 1, "the standby applied 1")
    first.process.kill()
    return second


def fetched(daemon: FakeDaemon) -> int:
    return sum(daemon.blobs[m["hash"]].__len__() for m in daemon.seen if m["type"] == "get_blob" and m["from"] == 1)


def errors(kernel: Kernel, msg_id: str) -> list[str]:
    return [m["content"]["ename"] for m in kernel.outputs(msg_id) if m["msg_type"] == "error"]


def test_it_takes_over_with_nothing_and_fetches_what_cells_name(daemon: FakeDaemon, moved: Kernel) -> None:
    reply = moved.shell(moved.client.complete("x = alph"), "complete_reply")[-1]["content"]
    assert (reply["matches"], reply["cursor_start"]) == (["alpha"], 4)
    assert fetched(daemon) == 0
    assert moved.value("1 + 1", 2) == "2"
    assert fetched(daemon) == 0
    assert moved.value("float(used())", 3) == "2.0"
    assert fetched(daemon) == 4_000_000
    reply = moved.shell(moved.client.inspect("alpha", 3), "inspect_reply")[-1]["content"]
    assert "ndarray" in reply["data"]["text/plain"]
    moved.run("del alpha", 4)
    assert daemon.log[-1][0]["deleted"] == ["alpha"]
    assert moved.value("beta.sum()", 5).startswith("np.float64(1000000")


def test_a_store_that_is_away_keeps_the_cell_from_running(daemon: FakeDaemon, moved: Kernel) -> None:
    daemon.store = "away"
    msg_id = moved.send("ran = True\nx = alpha[0]", 2)
    reply = next(m["content"] for m in moved.shell(msg_id, *ENDS) if m["msg_type"] == "execute_reply")
    assert (reply["status"], reply["ename"]) == ("error", "NotLoadedError")
    assert "alpha: not loaded on this replica yet" in reply["evalue"]
    assert "the store does not answer" in reply["evalue"]
    assert errors(moved, msg_id) == ["NotLoadedError"]
    daemon.store = "there"
    assert moved.value("'ran' in globals(), float(alpha[0])", 3) == "(False, 1.0)"
    assert daemon.log[1][0]["lost"] == {}


def test_loading_can_be_interrupted(daemon: FakeDaemon, moved: Kernel) -> None:
    daemon.store = "silent"
    msg_id = moved.send("x = alpha[0]", 2)
    until(lambda: any(m["type"] == "get_blob" for m in daemon.seen), "the replica asks for the value")
    moved.control("interrupt_request", {})
    reply = next(m["content"] for m in moved.shell(msg_id, *ENDS) if m["msg_type"] == "execute_reply")
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    daemon.store = "there"
    assert moved.value("float(alpha[0])", 3) == "1.0"


def test_a_callback_of_a_comm_finds_what_it_names(daemon: FakeDaemon, start: Callable[[int], Kernel]) -> None:
    """It is a function that the replica made itself, with Python's own builtins, before it let go of the value."""
    daemon.lazy = 1_000_000
    first, second = start(0).ready(), start(1).ready()
    target = "import comm\nseen = []\ndef opened(comm, message): seen.append(float(beta[1]))\n"
    first.run(MAKE + "\n" + target + "comm.get_comm_manager().register_target('t', opened)", 1)
    until(lambda: daemon.applied.get(1) == 1, "the standby applied 1")
    second.run("beta[1] = 7", 2)
    until(lambda: daemon.applied.get(0) == 2, "the first replica applied 2")
    content: dict[str, Any] = {"comm_id": "c", "target_name": "t", "data": {}}
    first.client.shell_channel.send(first.client.session.msg("comm_open", content))
    assert first.value("seen", 3) == "[7.0]"
