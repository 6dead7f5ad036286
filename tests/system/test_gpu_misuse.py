"""The daemon saw a kernel use a GPU beyond its grant: its user reads so under the cell, and the cell is interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.fake_daemon import FakeDaemon, Kernel

LONG = "print('begun', flush=True)\nimport time\nwhile True: time.sleep(0.05); print('tick', flush=True)"


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


def said(kernel: Kernel, msg_id: str, text: str, seconds: float = 10) -> dict[str, Any]:
    """The first output of the cell that has `text` in it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        message = kernel.iopub(seconds)
        about = message["parent_header"].get("msg_id") == msg_id
        if about and message["msg_type"] == "stream" and text in message["content"]["text"]:
            return message
    raise AssertionError(f"{text!r} was not said")


def misuse(daemon: FakeDaemon, stage: str) -> None:
    daemon.push(0, {"type": "gpu_misuse", "stage": stage, "text": f"NBOS: too much memory ({stage})"})


def test_a_warning_shows_under_the_running_cell_and_an_interrupt_ends_it(daemon: FakeDaemon, kernel: Kernel) -> None:
    msg_id = kernel.send(LONG, 1)
    said(kernel, msg_id, "begun")
    misuse(daemon, "warn")
    warning = said(kernel, msg_id, "too much memory (warn)")
    assert warning["content"]["name"] == "stderr"
    assert warning["topic"].endswith(b"stream.stderr")
    assert warning["topic"].startswith(b"nbos.")
    for _ in range(5):
        said(kernel, msg_id, "tick")  # it goes on
    misuse(daemon, "interrupt")
    said(kernel, msg_id, "too much memory (interrupt)")
    reply = next(m for m in kernel.shell(msg_id, "nbos_committed") if m["msg_type"] == "execute_reply")
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert kernel.value("6 * 7", 2) == "42"


def test_between_cells_it_shows_under_the_last_one_and_interrupts_nothing(daemon: FakeDaemon, kernel: Kernel) -> None:
    msg_id = kernel.send("a = 1", 1)
    kernel.shell(msg_id, "nbos_committed")
    misuse(daemon, "interrupt")
    said(kernel, msg_id, "too much memory (interrupt)")
    assert kernel.value("a", 2) == "1"
