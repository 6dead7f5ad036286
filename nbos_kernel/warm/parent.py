"""The warm parent: forks a spare for each request of its daemon, and tells how its children ended.

It has one thread and no sockets but the one to its daemon. It reaps in an order that leaves no doubt about pids: what
a replica started is ended with it before its pid, and so its process group, can be another's.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
from typing import Any

LONGEST = 64 * 1024


def serve(control: socket.socket) -> socket.socket | None:
    """Until the daemon closes `control`: None then. In a child it returns as well: the socket of that spare."""
    wake, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    poller = select.poll()
    poller.register(wake, select.POLLIN)
    poller.register(control, select.POLLIN)
    while True:
        ready = {number for number, _ in poller.poll()}
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
            _reap(control)
        if control.fileno() in ready:
            request, handed = _receive(control)
            if not request:
                return None
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(wake)
                os.close(waker)
                control.close()
                return _begin(handed)
            os.close(handed)
            _tell(control, type="forked", id=request["id"], pid=pid)


def _begin(handed: int) -> socket.socket:
    """In the child: what a process of its own needs."""
    os.setsid()
    gc.enable()
    return socket.socket(fileno=handed)


def _receive(control: socket.socket) -> tuple[dict[str, Any], int]:
    """A request and the socket that comes with it; nothing when the daemon is gone."""
    try:
        data, handed, _, _ = socket.recv_fds(control, LONGEST, 1)
    except ConnectionError:
        return {}, -1
    return (json.loads(data), handed[0]) if data else ({}, -1)


def _reap(control: socket.socket) -> None:
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        # Before waitpid: until then the pid, and so the group, is its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(ended.si_pid, signal.SIGKILL)
        _, status = os.waitpid(ended.si_pid, 0)
        _tell(control, type="ended", pid=ended.si_pid, code=os.waitstatus_to_exitcode(status))


def _tell(control: socket.socket, **message: Any) -> None:
    # A daemon that is gone is seen at the next read.
    with contextlib.suppress(ConnectionError):
        control.send(json.dumps(message).encode())
