"""What a cell left on a (simulated) device goes to host memory when the daemon asks for it, and is back with the next
cell that is granted one, before its first line."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.fake_daemon import FakeDaemon, Kernel

GIB = 1 << 30
MAKE = "%%gpu tpcs=4 mem=4G\nfrom nbos_kernel import simgpu\nw = simgpu.allocate('2G')"


def grant(uuid: str) -> dict[str, Any]:
    share = {"uuid": uuid, "index": 0, "model": "m", "tpcs": [0, 1, 2, 3], "memory": 4 * GIB, "kind": "simulated"}
    return {"grant": "g", "host": "h", "n": 1, "shares": [{**share, "whole": False}]}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path)
    yield daemon
    daemon.close()


@pytest.fixture
def kernel(daemon: FakeDaemon) -> Iterator[Kernel]:
    kernel = Kernel(daemon, 0)
    daemon.grant = grant("SIM-1")
    kernel.ready().run(MAKE, 1)
    daemon.grant = None
    yield kernel
    kernel.close()


def said(daemon: FakeDaemon, kind: str, count: int = 1) -> dict[str, Any]:
    """The latest of so many messages of this kind."""
    deadline = time.monotonic() + 10
    while len(found := [message for message in daemon.seen if message["type"] == kind]) < count:
        assert time.monotonic() < deadline, f"no {kind}"
        time.sleep(0.01)
    return dict(found[-1])


def ask(daemon: FakeDaemon) -> None:
    daemon.push(0, {"type": "give_back", "ask": "offload", "why": "somebody waits"})


def test_it_tells_what_is_left_moves_it_when_asked_and_has_it_back_in_the_next_cell(
    daemon: FakeDaemon, kernel: Kernel
) -> None:
    assert said(daemon, "release")["left"] == {"SIM-1": 2 * GIB}
    ask(daemon)
    answer = said(daemon, "gave_back")
    assert (answer["left"], answer["moved"], answer["away"], answer["stays"]) == ({}, 2 * GIB, 2 * GIB, "")
    assert kernel.value("w.where", 2) == "''", "a cell without a GPU finds it in host memory"
    daemon.grant = grant("SIM-2")
    assert kernel.value("w.where", 3) == "'SIM-2'", "on whichever device was granted"
    assert said(daemon, "bid", 3)["away"] == 2 * GIB
    assert said(daemon, "release", 2)["left"] == {"SIM-2": 2 * GIB}


def test_a_bid_that_waits_does_not_keep_it_from_giving_back(daemon: FakeDaemon, kernel: Kernel) -> None:
    daemon.hold = True
    msg_id = kernel.send("%%gpu tpcs=4\nw.where", 2, wait=True)
    said(daemon, "bid", 2)
    ask(daemon)
    assert said(daemon, "gave_back")["moved"] == 2 * GIB
    daemon.grant = grant("SIM-1")
    daemon.answer_held(0)
    kernel.shell(msg_id, "nbos_committed")
    assert said(daemon, "release", 2)["left"] == {"SIM-1": 2 * GIB}


def test_while_a_cell_without_a_gpu_runs_it_gives_back_after_that(daemon: FakeDaemon, kernel: Kernel) -> None:
    msg_id = kernel.send("import time; time.sleep(1); where = w.where", 2)
    said(daemon, "bid", 2)
    ask(daemon)
    kernel.shell(msg_id, "nbos_committed")
    assert said(daemon, "gave_back")["moved"] == 2 * GIB
    assert kernel.value("where", 3) == "'SIM-1'"


def rest(daemon: FakeDaemon, number: int = 1) -> None:
    """The daemon is about to have it checkpointed."""
    daemon.push(0, {"type": "give_back", "ask": "checkpoint", "number": number, "why": "somebody waits"})


def test_whatever_is_asked_of_a_process_that_rests_waits_until_it_is_thawed(daemon: FakeDaemon, kernel: Kernel) -> None:
    daemon.frozen = True
    rest(daemon)
    assert said(daemon, "gave_back")["number"] == 1
    ask(daemon)  # an offload would call CUDA, too
    msg_id = kernel.client.complete("simgpu.allo")
    said(daemon, "thaw", 2)
    with pytest.raises(queue.Empty):
        kernel.client.get_shell_msg(timeout=0)
    assert len([message for message in daemon.seen if message["type"] == "gave_back"]) == 1
    daemon.frozen = False
    assert "allocate" in kernel.shell(msg_id, "complete_reply")[-1]["content"]["matches"]


def test_a_cell_bids_for_what_is_frozen_and_runs_as_if_nothing_had_been(daemon: FakeDaemon, kernel: Kernel) -> None:
    rest(daemon)
    said(daemon, "gave_back")
    daemon.hold = True
    msg_id = kernel.send("import gc; assert gc.isenabled()", 2, wait=True)
    said(daemon, "bid", 2)
    daemon.push(0, {"type": "thawed"})
    daemon.answer_held(0)
    kernel.shell(msg_id, "nbos_committed")
    assert kernel.value("w.where", 3) == "'SIM-1'"


def test_it_rests_only_once_the_cell_and_its_append_are_over(daemon: FakeDaemon, kernel: Kernel) -> None:
    msg_id = kernel.send("import time; time.sleep(1)", 2)
    said(daemon, "bid", 2)
    rest(daemon)
    kernel.shell(msg_id, "nbos_committed")
    said(daemon, "gave_back")
    kinds = [message["type"] for message in daemon.seen]
    assert kinds.index("gave_back") > len(kinds) - 1 - kinds[::-1].index("append")


def test_another_executors_entry_is_applied_only_when_it_is_thawed(daemon: FakeDaemon, kernel: Kernel) -> None:
    other = Kernel(daemon, 1)
    try:
        other.ready()
        daemon.frozen = True
        rest(daemon)
        said(daemon, "gave_back")
        other.run("a = 1", 2)
        said(daemon, "thaw", 2)
        assert daemon.applied[0] == 1
        daemon.frozen = False
        assert kernel.value("a", 3) == "1"
    finally:
        other.close()
