"""A real replica process against a daemon that answers by the protocol from memory, and a client that speaks
Jupyter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from .fake_daemon import FakeDaemon, Kernel

ENDS = ("nbos_committed", "nbos_failed", "nbos_yield")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path)
    yield daemon
    daemon.close()


@pytest.fixture
def start(daemon: FakeDaemon) -> Iterator[Callable[[int], Kernel]]:
    kernels: list[Kernel] = []

    def begin(index: int) -> Kernel:
        kernels.append(Kernel(daemon, index))
        return kernels[-1]

    yield begin
    for kernel in kernels:
        kernel.close()


@pytest.fixture
def kernel(start: Callable[[int], Kernel]) -> Kernel:
    return start(0).ready()


def until(condition: Callable[[], object], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.005)


def kinds(messages: list[dict]) -> list[str]:
    return [message["msg_type"] for message in messages]


def test_a_cell_leads_replies_and_commits(daemon: FakeDaemon, kernel: Kernel) -> None:
    msg_id = kernel.send("print('out')\n40 + 2", 1)
    assert kinds(kernel.shell(msg_id, *ENDS)) == ["nbos_lead", "execute_reply", "nbos_committed"]
    outputs = kernel.outputs(msg_id)
    assert kinds(outputs) == ["execute_input", "stream", "execute_result", "status"]
    assert all(message["topic"].startswith(b"nbos.101.") for message in outputs)
    entry, _ = daemon.log[0]
    assert (entry["source"], entry["execution_count"]) == ("print('out')\n40 + 2", 1)


def test_a_yield_leaves_no_trace_on_iopub(daemon: FakeDaemon, kernel: Kernel) -> None:
    daemon.refuse[1] = {"code": "taken", "reason": "another", "next": None}
    msg_id = kernel.send("print('never')", 1)
    (answer,) = kernel.shell(msg_id, *ENDS)
    assert answer["content"]["code"] == "taken"
    marker = kernel.client.kernel_info()
    assert kinds(kernel.outputs(marker)) == ["status", "status"]
    del daemon.refuse[1]
    assert kernel.run("1", 1)["content"]["execution_count"] == 1


def test_an_unnumbered_cell_is_refused_with_the_reason(kernel: Kernel) -> None:
    msg_id = kernel.client.execute("1")
    (reply,) = kernel.shell(msg_id, "execute_reply")
    assert "router" in reply["content"]["evalue"]


def test_a_standby_takes_over_with_the_variables(daemon: FakeDaemon, start: Callable[[int], Kernel]) -> None:
    first, second = start(0).ready(), start(1).ready()
    first.run("import numpy as np\na = np.arange(200_000); b = a[5:]; items = [1]; same = items\n'shown'", 1)
    first.run("class C: pass\nc = C(); items.append(2)\ng = (i for i in items)", 2)
    first.process.kill()
    until(lambda: daemon.applied.get(1) == 2, "standby applied 2")
    assert (
        second.run("a[5] = 77; assert b[0] == 77; assert items is same == [1, 2] or items is same", 3)["content"][
            "status"
        ]
        == "ok"
    )
    assert second.value("(items, type(c) is C, _1, In[2][:7], len(Out))", 4) == "([1, 2], True, 'shown', 'class C', 1)"
    reply = second.run("g", 5)
    assert reply["content"]["ename"] == "NotReplicatedError"
    assert "generator" in reply["content"]["evalue"]
    assert reply["content"]["execution_count"] == 5 - 1  # the empty cell 4 had no count


def test_a_new_replica_starts_from_the_log(daemon: FakeDaemon, start: Callable[[int], Kernel]) -> None:
    first = start(0).ready()
    for n in range(1, 6):
        first.run(f"v{n} = {n}", n)
    late = start(2).ready()
    until(lambda: daemon.applied.get(2) == 5, "the new replica applied 5")
    assert late.value("v1 + v5", 6) == "6"


def test_interrupt_ends_the_cell_and_the_kernel_goes_on(kernel: Kernel) -> None:
    kernel.run("import time, signal", 1)
    for n, code in (
        (2, "print('on', flush=True)\nwhile True: time.sleep(0.01)"),
        (3, "print('on', flush=True)\nimport asyncio\nawait asyncio.sleep(60)"),
    ):
        msg_id = kernel.send(code, n)
        while kernel.iopub()["msg_type"] != "stream":
            pass
        kernel.control("interrupt_request", {})
        messages = kernel.shell(msg_id, *ENDS)
        assert kinds(messages) == ["nbos_lead", "execute_reply", "nbos_committed"]
        assert messages[1]["content"]["ename"] in ("KeyboardInterrupt", "CancelledError")
    for _ in range(3):
        kernel.control("interrupt_request", {})
    assert kernel.run("2", 4)["content"]["status"] == "ok"


@pytest.mark.parametrize("way", ["cancel", "interrupt"])
def test_a_waiting_cell_shows_its_place_and_leaves_the_queue(daemon: FakeDaemon, kernel: Kernel, way: str) -> None:
    daemon.hold = True
    msg_id = kernel.send("%%gpu 1\n1", 1, wait=True)
    (waiting,) = kernel.shell(msg_id, "nbos_waiting")
    assert waiting["content"]["position"] == 1
    if way == "cancel":
        assert kernel.control("nbos_cancel_request", {"n": 1})["content"]["status"] == "ok"
    else:
        kernel.control("interrupt_request", {})
    (answer,) = kernel.shell(msg_id, *ENDS)
    assert (answer["msg_type"], answer["content"]["code"]) == ("nbos_yield", "cancelled")
    daemon.hold = False
    assert kernel.run("1", 1)["content"]["status"] == "ok"


def test_input_is_asked_and_answered(kernel: Kernel) -> None:
    msg_id = kernel.send("name = input('who? ')", 1)
    request = kernel.client.get_stdin_msg(timeout=15)
    assert request["content"]["prompt"] == "who? "
    kernel.client.input("me")
    kernel.shell(msg_id, *ENDS)
    assert kernel.value("name", 2) == "'me'"


def test_a_question_waits_for_whoever_connects_late(kernel: Kernel) -> None:
    late, kernel.client = kernel.client, BlockingKernelClient(connection_file=kernel.file)
    kernel.client.load_connection_file()
    kernel.client.start_channels(stdin=False)
    late.stop_channels()
    kernel.ready()
    kernel.send("print('asks', flush=True); name = input('who? ')", 1)
    while kernel.iopub()["msg_type"] != "stream":
        pass
    request = kernel.client.get_stdin_msg(timeout=15)  # connects now
    assert request["content"]["prompt"] == "who? "
    kernel.client.input("me")
    assert kernel.value("name", 2) == "'me'"


def test_resources_of_the_cell_reach_the_bid_and_the_grant_the_cell(daemon: FakeDaemon, kernel: Kernel) -> None:
    share = {
        "uuid": "GPU-1",
        "index": 0,
        "model": "sim",
        "tpcs": [0, 1],
        "memory": 1024,
        "whole": False,
        "kind": "simulated",
    }
    daemon.grant = {"grant": "g1", "host": "host-0", "n": 1, "shares": [share]}
    reply = kernel.run("%%gpu tpcs=2 mem=1K\nimport nbos_kernel, os\nheld = nbos_kernel.grant()\n1/0", 1)
    assert "line 4" in "".join(reply["content"]["traceback"])
    bid = next(m for m in daemon.seen if m["type"] == "bid")
    types = [m["type"] for m in daemon.seen]
    assert types.index("release") < types.index("append")
    assert bid["resources"] == {"gpus": 0, "tpcs": 2, "memory": 1024, "model": ""}
    daemon.grant = None
    assert kernel.value("(held.tpcs, held.simulated, nbos_kernel.grant())", 2) == "(2, True, None)"


def test_a_bad_gpu_line_is_an_error_that_names_the_limit(kernel: Kernel) -> None:
    reply = kernel.run("%%gpu 1000\n1", 1)
    assert reply["content"]["status"] == "error"
    assert "0 to 64" in reply["content"]["evalue"]


def test_the_control_channel_answers_while_a_cell_runs(daemon: FakeDaemon, kernel: Kernel) -> None:
    kernel.run("import time", 1)
    msg_id = kernel.send("print('on', flush=True)\nwhile True: time.sleep(0.01)", 2)
    while kernel.iopub()["msg_type"] != "stream":
        pass
    assert kernel.control("nbos_status_request", {})["content"]["last"] == 1
    assert kernel.control("nbos_outcome_request", {"n": 1, "abandon": False})["content"]["state"] == "committed"
    daemon.push(0, {"type": "members", "epoch": 3, "members": []})
    message = kernel.iopub()
    while message["msg_type"] != "nbos_members":
        message = kernel.iopub()
    assert (message["topic"], message["content"]["epoch"]) == (b"nbos.members", 3)
    daemon.push(0, {"type": "token", "n": 2, "token": 999})
    kernel.control("nbos_status_request", {})
    kernel.control("interrupt_request", {})
    kernel.shell(msg_id, *ENDS)
    assert kernel.outputs(msg_id)[-1]["topic"].startswith(b"nbos.999.")


def test_it_survives_its_daemon(daemon: FakeDaemon, kernel: Kernel) -> None:
    kernel.run("a = 1", 1)
    daemon.go_away(0)
    until(lambda: kernel.control("nbos_status_request", {})["content"]["status"] == "error", "the link is down")
    msg_id = kernel.send("a", 2)
    (answer,) = kernel.shell(msg_id, *ENDS)
    assert answer["content"]["code"] == "unavailable"
    daemon.listen(0)
    until(lambda: daemon.seen[-1]["type"] in ("hello", "cancel", "applied"), "hello again")
    until(lambda: kernel.control("nbos_status_request", {})["content"]["status"] == "ok", "the link is up")
    assert kernel.run("a", 2)["content"]["status"] == "ok"
    hellos = [m for m in daemon.seen if m["type"] == "hello"]
    assert hellos[-1]["applied"] == 1
    assert hellos[-1]["ports"]["shell"] == kernel.client.shell_port


def test_a_cell_that_ends_while_the_daemon_is_away_commits_later(daemon: FakeDaemon, kernel: Kernel) -> None:
    kernel.run("import time, os", 1)
    msg_id = kernel.send(
        f"while not os.path.exists({str(daemon.directory / 'go')!r}): time.sleep(0.01)\nb = 5",
        2,
    )
    kernel.shell(msg_id, "nbos_lead")
    daemon.go_away(0)
    (daemon.directory / "go").touch()
    kernel.shell(msg_id, "execute_reply")
    daemon.listen(0)
    kernel.shell(msg_id, "nbos_committed")
    assert daemon.log[1][0]["components"][0]["names"] == ["b"]
    running = [m["running"] for m in daemon.seen if m["type"] == "hello"][-1]
    assert running == {"n": 2, "token": 102}


def test_a_fenced_executor_says_so_and_ends(daemon: FakeDaemon, kernel: Kernel) -> None:
    daemon.fence.add(1)
    msg_id = kernel.send("a = 1", 1)
    assert kernel.shell(msg_id, *ENDS)[-1]["msg_type"] == "nbos_failed"
    until(lambda: kernel.process.poll() is not None, "the process ended")


def test_a_sync_replicates_what_changed_between_cells(daemon: FakeDaemon, kernel: Kernel) -> None:
    kernel.run(
        "import threading\nbox = []\nevent = threading.Event()\n"
        "def late():\n    event.wait(); box.append(1)\nthreading.Thread(target=late, daemon=True).start()",
        1,
    )
    msg_id = kernel.send("", 2, kind="nbos_sync_request")
    (answer,) = kernel.shell(msg_id, *ENDS)
    assert answer["content"] == {"n": 2, "nothing": True}
    kernel.run("event.set()\nwhile not box: pass\nbox.clear()\nthreading.Timer(0.5, box.append, (7,)).start()", 2)

    def synced() -> bool:
        msg_id = kernel.send("", len(daemon.log) + 1, kind="nbos_sync_request")
        return not kernel.shell(msg_id, *ENDS)[-1]["content"].get("nothing")

    def names() -> list[list[str]]:
        assert daemon.log[-1][0]["kind"] == "sync"
        return [component["names"] for component in daemon.log[-1][0]["components"]]

    # The waiter that leaves the event may be a change of its own.
    until(lambda: synced() and ["box"] in names(), "the thread's change was found")


def test_durable_appends_before_the_reply(daemon: FakeDaemon, start: Callable[[int], Kernel]) -> None:
    daemon.durable = True
    kernel = start(0).ready()
    msg_id = kernel.send("a = 1", 1)
    assert kinds(kernel.shell(msg_id, "execute_reply"))[-1] == "execute_reply"
    assert len(daemon.log) == 1


def test_completion_inspection_history_and_info_work(kernel: Kernel) -> None:
    kernel.run("variable_one = 1", 1)
    reply = kernel.shell(kernel.client.complete("variable_o"), "complete_reply")[-1]
    assert "variable_one" in reply["content"]["matches"]
    reply = kernel.shell(kernel.client.history(hist_access_type="tail", n=1), "history_reply")[-1]
    assert reply["content"]["history"][-1][2] == "variable_one = 1"
    reply = kernel.shell(kernel.client.kernel_info(), "kernel_info_reply")[-1]
    assert (reply["content"]["implementation"], reply["content"]["language_info"]["name"]) == ("nbos", "python")


def test_an_error_does_not_abort_what_is_queued(kernel: Kernel) -> None:
    first, second = kernel.send("1/0", 1), kernel.send("'ran'", 2)
    kernel.shell(first, *ENDS)
    assert kernel.shell(second, *ENDS)[1]["content"]["status"] == "ok"


def test_exit_ends_the_process(daemon: FakeDaemon, kernel: Kernel) -> None:
    assert kernel.value("1 + 1", 1) == "2", "it is connected"
    daemon.push(0, {"type": "exit", "reason": "the kernel was deleted"})
    until(lambda: kernel.process.poll() is not None, "the process ended")
