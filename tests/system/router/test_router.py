"""The router process between a stock client and real ipykernels: everything a notebook does, and failures."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from jupyter_client import BlockingKernelClient

from .rig import Rig, Seen, rig, run, wait_for

Pair = tuple[Rig, BlockingKernelClient]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with rig(tmp_path_factory.mktemp("shared")) as pair:
        yield pair


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Pair]:
    with rig(tmp_path) as pair:
        yield pair


def test_a_cell_gets_one_busy_one_reply_one_idle(shared: Pair) -> None:
    seen = run(shared[1], "print('hello')")
    assert (seen.states, seen.text, seen.reply["status"]) == (["busy", "idle"], "hello\n", "ok")


def test_kernel_info_and_completion_pass(shared: Pair) -> None:
    client = shared[1]
    run(client, "alphabet = 1")
    client.complete("alphab")
    assert "alphabet" in client.get_shell_msg(timeout=10)["content"]["matches"]


def test_input_is_asked_of_the_client(shared: Pair) -> None:
    client = shared[1]
    msg_id = client.execute("print(input('name? '))", allow_stdin=True)
    assert client.get_stdin_msg(timeout=10)["content"]["prompt"] == "name? "
    client.input("Ada")
    assert Seen(client, msg_id).finish().text == "Ada\n"


def test_an_error_aborts_what_is_queued_and_nothing_later(shared: Pair) -> None:
    client = shared[1]
    ids = [client.execute(code) for code in ("1/0", "print('never')", "print('never')")]
    replies = [client.get_shell_msg(timeout=20) for _ in ids]
    assert [reply["content"]["status"] for reply in replies] == ["error", "aborted", "aborted"]
    assert Seen(client, ids[2]).until(lambda seen: "idle" in seen.states).states == ["busy", "idle"]
    assert run(client, "print('again')").text == "again\n"


def test_a_running_cell_is_interrupted(shared: Pair) -> None:
    client = shared[1]
    msg_id = client.execute("print('in'); import time; time.sleep(60)")
    seen = Seen(client, msg_id).until(lambda seen: "in" in seen.text)
    client.control_channel.send(client.session.msg("interrupt_request", {}))
    assert client.get_control_msg(timeout=10)["msg_type"] == "interrupt_reply"
    assert seen.finish().reply["ename"] == "KeyboardInterrupt"


def test_a_comm_reaches_a_waiting_cell_past_queued_cells(shared: Pair) -> None:
    client = shared[1]
    run(
        client,
        "import asyncio; from comm import create_comm\nc = create_comm('t', comm_id='k1'); got = asyncio.Event()\n"
        "c.on_msg(lambda m: got.set())",
    )
    waiting = client.execute("print('in'); await got.wait(); print('got')")
    seen = Seen(client, waiting).until(lambda seen: "in" in seen.text)
    last = client.execute("print('after')")
    client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": "k1", "data": {}}))
    assert "got" in seen.finish().text
    assert Seen(client, last).finish().text == "after\n"


def test_changes_by_a_comm_between_cells_are_synced(shared: Pair) -> None:
    it, client = shared
    run(client, "from comm import create_comm\nc2 = create_comm('t', comm_id='k2'); c2.on_msg(lambda m: None)")
    (it.root / "synced").unlink(missing_ok=True)
    client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": "k2", "data": {}}))
    wait_for((it.root / "synced").exists, 10, "a sync")
    assert run(client, "print(1)").reply["status"] == "ok"


def test_ten_thousand_lines_arrive_whole_and_in_order(shared: Pair) -> None:
    seen = run(shared[1], "for i in range(10000): print(i)")
    assert seen.text.split() == [str(i) for i in range(10000)]


def test_twenty_megabytes_arrive_whole(shared: Pair) -> None:
    code = "from IPython.display import publish_display_data as p; p({'text/plain': 'x' * 20_000_000})"
    assert [len(shown) for shown in run(shared[1], code).shown] == [20_000_000]


def test_forged_and_replayed_messages_are_dropped(shared: Pair) -> None:
    it, client = shared
    forger = BlockingKernelClient()
    forger.load_connection_info({**it.connection_info(), "key": b"another"})
    forger.start_channels()
    forger.execute("forged = 1")
    forger.shell_channel.socket.send_multipart([b"<IDS|MSG>", b"rubbish"])
    replayed = client.session.msg("execute_request", {"code": "print('twice')", "silent": False})
    frames = client.session.serialize(replayed)
    for _ in range(2):
        client.shell_channel.socket.send_multipart(frames)
    assert Seen(client, replayed["header"]["msg_id"]).finish().text == "twice\n"
    assert run(client, "'forged' in dir()").reply["execution_count"]
    forger.stop_channels()


def test_a_client_without_the_curve_key_gets_nothing(shared: Pair) -> None:
    info = {key: value for key, value in shared[0].connection_info().items() if not key.startswith("curve")}
    stranger = BlockingKernelClient()
    stranger.load_connection_info(info)
    stranger.start_channels()
    stranger.shell_channel.socket.sndtimeo = 1000  # once it was refused, there is nobody to send to
    with pytest.raises((RuntimeError, zmq.Again)):
        stranger.wait_for_ready(timeout=1)
    stranger.stop_channels()


def test_the_heartbeat_beats_while_a_cell_runs(shared: Pair) -> None:
    client = shared[1]
    msg_id = client.execute("import time; print('in'); time.sleep(1.5)")
    Seen(client, msg_id).until(lambda seen: "in" in seen.text)
    client.hb_channel.unpause()
    time.sleep(1.2)  # the client's own beat is once a second
    assert client.hb_channel.is_beating()
    Seen(client, msg_id).finish()


def test_executor_killed_between_cells_the_next_reply_comes_within_a_second(own: Pair) -> None:
    it, client = own
    run(client, "1")
    it.kill(it.executor(1))
    began = time.monotonic()
    assert run(client, "print('on')").text == "on\n"
    assert time.monotonic() - began < 1.0


def test_executor_killed_in_a_cell_tells_and_goes_on(own: Pair) -> None:
    it, client = own
    msg_id = client.execute("import time; print('in'); time.sleep(60)")
    seen = Seen(client, msg_id).until(lambda seen: "in" in seen.text)
    gone = it.executor(1)
    it.kill(gone)
    began = time.monotonic()
    seen.until(lambda seen: "was lost" in seen.text)
    assert time.monotonic() - began < 2.0
    assert f"replica {gone} on host host-{gone}" in seen.text
    seen.finish()
    assert (seen.reply["ename"], seen.states) == ("NBOSReplicaDied", ["busy", "idle"])
    assert run(client, "print('on')").text == "on\n"


def test_a_lost_hosts_cell_runs_again_once(own: Pair) -> None:
    it, client = own
    (it.root / "lost-host").touch()
    msg_id = client.execute("import time; print('in', flush=True); time.sleep(1)")
    seen = Seen(client, msg_id).until(lambda seen: "in" in seen.text)
    it.kill(it.executor(1))
    seen.finish()
    assert (seen.reply["status"], seen.text.count("in\n"), seen.states) == ("ok", 2, ["busy", "idle"])
    assert "runs again" in seen.text


def test_a_frozen_executor_is_found_by_its_heartbeat_and_may_come_back(own: Pair) -> None:
    it, client = own
    msg_id = client.execute("import time; print('in', flush=True); time.sleep(2); print('out')")
    seen = Seen(client, msg_id).until(lambda seen: "in" in seen.text)
    frozen = it.executor(1)
    it.kill(frozen, signal.SIGSTOP)
    seen.until(lambda seen: "was lost" in seen.text)
    it.kill(frozen, signal.SIGCONT)
    seen.finish()
    assert (seen.reply["status"], seen.states) == ("ok", ["busy", "idle"])


def test_a_cell_without_room_waits_and_says_why_then_runs(own: Pair) -> None:
    it, client = own
    for index in range(3):
        (it.root / f"busy-{index}").touch()
    msg_id = client.execute("print('ran')")
    seen = Seen(client, msg_id).until(lambda seen: any("position 1 of 2" in shown for shown in seen.shown))
    (it.root / "busy-1").unlink()
    seen.finish()
    assert (seen.text, seen.states, it.executor(1)) == ("ran\n", ["busy", "idle"], 1)
    assert "runs on replica 1" in seen.shown[-1]


def test_interrupt_takes_a_waiting_cell_out_of_the_queue(own: Pair) -> None:
    it, client = own
    for index in range(3):
        (it.root / f"busy-{index}").touch()
    msg_id = client.execute("print('never')")
    seen = Seen(client, msg_id).until(lambda seen: bool(seen.shown))
    client.control_channel.send(client.session.msg("interrupt_request", {}))
    assert client.get_control_msg(timeout=10)["content"]["status"] == "ok"
    assert seen.finish().reply["ename"] == "KeyboardInterrupt"
    for index in range(3):
        (it.root / f"busy-{index}").unlink()
    assert run(client, "print('next')").text == "next\n"


def test_requests_wait_for_the_first_replica(tmp_path: Path) -> None:
    it = Rig(tmp_path, replicas=0)
    client = it.client()
    try:
        client.kernel_info()
        msg_id = client.execute("print('first')")
        it.start_replica(0)
        it.tell_members()
        assert client.get_shell_msg(timeout=30)["msg_type"] == "kernel_info_reply"
        assert Seen(client, msg_id).until(lambda seen: "idle" in seen.states).text == "first\n"
    finally:
        client.stop_channels()
        it.close()


def test_the_router_ends_when_its_stdin_closes(tmp_path: Path) -> None:
    it = Rig(tmp_path, replicas=0)
    it.close()
    assert it.router.returncode == 0


def test_the_router_is_small_again_after_large_outputs(own: Pair) -> None:
    it, client = own
    code = "from IPython.display import publish_display_data as p; p({'text/plain': 'x' * 20_000_000})"
    for _ in range(4):
        assert len(run(client, code).shown[-1]) == 20_000_000
    resident = psutil.Process(it.router.pid).memory_info
    wait_for(lambda: resident().rss <= 60_000_000, 10, f"60 MB resident; it has {resident().rss}")
