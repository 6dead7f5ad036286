"""A spare: waits until it is told which replica to be, and takes on what a fresh process would have been given."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbos_kernel

from . import renewal
from .title import retitle


@dataclass(frozen=True)
class Assignment:
    """argv: of the replica's command line, from the interpreter on. cwd: a folder that is there."""

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str


@dataclass(frozen=True)
class Told:
    """connection: content of the connection file, for a spare that does not see the daemon's files."""

    assignment: Assignment
    connection: str = ""


def wait(own: socket.socket) -> Told | None:
    """Until the daemon says what to be; None when it is gone, or wants this spare no more.

    With the message come a file that holds the assignment as JSON, and before it, unless output stays where it is, the
    descriptor where it goes.
    """
    try:
        said, handed, _, _ = socket.recv_fds(own, 64, 2)
    except ConnectionError:
        return None
    if not said:
        return None
    *output, file = handed
    with os.fdopen(file, "rb") as source:
        source.seek(0)
        told = json.load(source)
    for number in output:
        os.dup2(number, 1)
        os.dup2(number, 2)
        os.close(number)
    own.close()
    return Told(Assignment(tuple(told["argv"]), told["env"], told["cwd"]), told.get("connection", ""))


def become(assignment: Assignment) -> None:
    """Environment, folder, command line and random numbers as in a process that was started for this replica."""
    os.environ.clear()
    os.environ.update(assignment.env)
    time.tzset()
    # As `python -m` has it, unless PYTHONSAFEPATH is set. The folder there is the warm parent's own, an empty one.
    if sys.path[:1] == [os.getcwd()]:
        sys.path[0] = assignment.cwd
    os.chdir(assignment.cwd)
    sys.argv = [str(Path(nbos_kernel.__file__).with_name("__main__.py")), *assignment.argv[3:]]
    sys.orig_argv[:] = assignment.argv
    importlib.invalidate_caches()
    renewal.renew()
    retitle(assignment.argv)
