"""The capture begins when the reply is gone, as a real socket on a thread of its own says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import zmq
from tornado.ioloop import IOLoop
from zmq.eventloop.zmqstream import ZMQStream

from nbos_kernel.departure import Departure


class Shell:
    """The shell channel's thread, which can be kept from running."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.socket, self.client = self.context.socket(zmq.PAIR), self.context.socket(zmq.PAIR)
        self.socket.bind("inproc://shell")
        self.client.connect("inproc://shell")
        started = threading.Event()
        self.free = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(started,))
        self.thread.start()
        assert started.wait(30)

    def _run(self, started: threading.Event) -> None:
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.stream = ZMQStream(self.socket, IOLoop.current())
        self.loop.call_soon(started.set)
        self.loop.run_forever()

    def reply(self) -> None:
        """Hand one over; it is sent once `free` is set."""
        self.loop.call_soon_threadsafe(self.free.wait, 30)
        self.loop.call_soon_threadsafe(self.stream.send_multipart, [b"reply"])

    def close(self) -> None:
        self.free.set()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)
        self.context.destroy(linger=0)


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.close()


def test_a_reply_is_gone_once_it_was_sent_and_each_one_for_itself(shell: Shell) -> None:
    departure = Departure()
    departure.watch(shell.stream)
    for _ in range(2):
        departure.ready()
        shell.free.clear()
        shell.reply()
        assert not departure.gone(0.001)
        shell.free.set()
        assert departure.gone(30)
        assert shell.client.recv_multipart() == [b"reply"]


def test_a_reply_that_does_not_leave_is_waited_for_no_longer_than_that(shell: Shell) -> None:
    departure = Departure()
    departure.watch(shell.stream)
    departure.ready()
    shell.reply()
    assert not departure.gone()
