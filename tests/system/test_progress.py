"""A replication that takes long, and one about to cost much: a real replica, a daemon whose disk is slow or full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .fake_daemon import FakeDaemon, Kernel

MIB = 1 << 20


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path)
    yield daemon
    daemon.close()


@pytest.fixture
def kernel(daemon: FakeDaemon) -> Iterator[Kernel]:
    kernel = Kernel(daemon, 0)
    yield kernel.ready()
    kernel.close()


def heard(kernel: Kernel, code: str, n: int) -> list[dict[str, Any]]:
    """All that a cell's iopub holds until the next cell is over."""
    msg_id = kernel.send(code, n)
    kernel.shell(msg_id, "nbos_committed")
    end = kernel.send("", n + 1)
    kernel.shell(end, "nbos_committed")
    found = []
    while True:
        message = kernel.iopub()
        parent = message["parent_header"].get("msg_id")
        if parent == msg_id:
            found.append(message)
        elif parent == end and message["content"].get("execution_state") == "idle":
            return found


def progress_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["msg_type"] == "nbos_progress"]


def test_it_tells_how_far_it_is(daemon: FakeDaemon, kernel: Kernel) -> None:
    daemon.seconds_a_blob = 0.3
    told = progress_of(heard(kernel, "import os\nblob = os.urandom(40 << 20)", 1))
    assert {message["topic"] for message in told} == {b"nbos.101.nbos_progress"}
    looks = [message["content"] for message in told]
    assert {(look["n"], look["what"]) for look in looks} == {(1, "40.0 MiB of blob")}
    done = [look["done"] for look in looks if look["total"]]
    assert done == sorted(done)
    assert len(set(done)) >= 2
    assert any(look["left"] is not None and f"{look['left']:.1f} s left" in look["text"] for look in looks)
    assert all(look["seconds"] >= 1.0 for look in looks)


def test_a_short_one_tells_nothing(daemon: FakeDaemon, kernel: Kernel) -> None:
    assert progress_of(heard(kernel, "blob = bytes(range(256)) * 40_000", 1)) == []


def test_too_little_room_is_told_before_it_fails(daemon: FakeDaemon, kernel: Kernel) -> None:
    daemon.room = 100 * MIB
    found = heard(kernel, "import os\nblob = os.urandom(256 << 20)", 1)
    asked = [message["type"] for message in daemon.seen]
    assert asked.index("room") < asked.index("put_blob")
    said = "".join(message["content"].get("text", "") for message in found if message["msg_type"] == "stream")
    assert "the memory of a test has 100.0 MiB left, and this cell's changes need 256.0 MiB" in said


def test_the_state_as_a_dict_and_as_a_display(daemon: FakeDaemon, kernel: Kernel) -> None:
    kernel.run("import os\nblob = os.urandom(8 << 20)\ngen = (i for i in [])", 1)
    size = "next(r['size'] for r in s['components'] if 'blob' in r['names']) >> 20"
    kernel.run("s = %nbos state --json", 2)
    assert kernel.value(size, 3) == "8"
    assert kernel.value("s['last']['fresh'] >> 20, s['last']['chunks'] > 1, s['last']['seconds']['safe'] > 0", 4) == (
        "(8, True, True)"
    )
    msg_id = kernel.send("%nbos state", 5)
    kernel.shell(msg_id, "nbos_committed")
    (shown,) = [m["content"]["data"] for m in kernel.outputs(msg_id) if m["msg_type"] == "display_data"]
    assert "blob  [bytes, 8,388,608]" in shown["text/plain"]
    assert "not replicated  gen" in shown["text/plain"]
    assert "<td" in shown["text/html"]
