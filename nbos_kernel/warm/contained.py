"""A spare that is alone in a container: `python -m nbos_kernel.warm --contained SOCKET [MODULE…]`.

It connects to its daemon's socket in the folder that was mounted for it, says what it has imported, and waits. When the
daemon goes away it waits for the next one; when none comes, or it had been chosen already, it ends. What it is told to
be, it becomes once: the socket is closed before any user code can run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

from .imports import import_all, ready
from .spare import Assignment, Told, wait

COMES_BACK_WITHIN = 60.0
"""Seconds that a daemon has to be started again."""
LOOK_EVERY = 0.1
TAKEN = "taken"
"""As `gpu_daemon.slot` has it."""
MARK = "NBOS: "
"""As `gpu_daemon.container_check` has it: lines for the kernel's user begin with it."""


def serve(path: str, modules: list[str]) -> Assignment | None:
    """What to be; None: the daemon is gone, or wants this spare no more."""
    found = import_all(modules, allowed=(0, 1, 2))
    said = {**ready(found), "private": _private()}
    while (own := _connect(path)) is not None:
        with own, contextlib.suppress(ConnectionError):
            own.send(json.dumps(said).encode())
            told = wait(own)
            if told is not None:
                return _settle(told)
        if Path(path).with_name(TAKEN).exists():
            return None
    return None


def _connect(path: str) -> socket.socket | None:
    deadline = time.monotonic() + COMES_BACK_WITHIN
    while time.monotonic() < deadline:
        own = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            own.connect(path)
        except OSError:
            # Not there (yet): the daemon takes the socket away as soon as it is connected to.
            own.close()
            time.sleep(LOOK_EVERY)
        else:
            return own
    return None


def _settle(told: Told) -> Assignment:
    """The environment is the container's with the kernel's own additions; the folder one that can be used."""
    assignment = told.assignment
    with open(os.open(assignment.argv[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(told.connection)
    return replace(assignment, env={**os.environ, **assignment.env}, cwd=_usable(assignment.cwd))


def _usable(folder: str) -> str:
    for place in (folder, os.environ.get("HOME", "/"), "/tmp"):
        try:
            os.chdir(place)
        except OSError as err:
            print(f"{MARK}the folder {place} cannot be used ({err.strerror})", flush=True)
        else:
            # `become` compares with the folder in which this process imported.
            os.chdir(_EMPTY)
            return place
    return "/"


_EMPTY = "/dev/shm"
"""Where such a spare starts: nothing is there yet that `import` could find."""


def _private() -> int:
    """Bytes that no other process shares with it; 0 when that cannot be read."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private_", "Swap:")))
