"""`python -m nbos_kernel.warm [--spare|--gently|--judge] FD [MODULE…]`, and in a container `--contained SOCKET
[MODULE…]`: what a gpu_daemon starts ahead of replicas."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from typing import NoReturn

from .parent import serve
from .spare import Assignment, become, wait
from .title import ROOM, retitle


def main() -> None:
    if sys.argv[1:2] == ["--contained"]:
        _begin(_contained())
    # No collection before the fork: it would write to, and so unshare, every page (docs of gc.freeze).
    gc.disable()
    way = sys.argv[1] if sys.argv[1].startswith("--") else ""
    number, *modules = (word for word in sys.argv[1 + bool(way) :] if word != ROOM)
    retitle([sys.executable, "-m", "nbos_kernel.warm", *([way] if way else []), *modules])
    own: socket.socket | None = socket.socket(fileno=int(number))
    assert own is not None
    if way == "--judge":
        from .judging import judge_all

        judge_all(modules, own)
        _end()
    from .imports import import_all, ready

    alone = way == "--spare"
    found = import_all(modules, allowed=(0, 1, 2, own.fileno()), gently=way == "--gently")
    own.send(json.dumps(ready(found)).encode())
    if alone:
        gc.enable()
    elif found.unsafe:
        _end()
    else:
        gc.freeze()
        own = serve(own)
        retitle([sys.executable, "-m", "nbos_kernel.warm", "spare"])
    told = wait(own) if own is not None else None
    _begin(told.assignment if told is not None else None)


def _contained() -> Assignment | None:
    path, *modules = (word for word in sys.argv[2:] if word != ROOM)
    retitle([sys.executable, "-m", "nbos_kernel.warm", "--contained", path, *modules])
    from .contained import serve as wait_for_daemon

    return wait_for_daemon(path, modules)


def _begin(assigned: Assignment | None) -> NoReturn:
    if assigned is None:
        _end()
    become(assigned)
    from nbos_kernel.app import NBOSKernelApp

    NBOSKernelApp.launch_instance()
    sys.exit()


def _end() -> NoReturn:
    """Threads that modules started could keep a process that merely returns for ever."""
    os._exit(0)


if __name__ == "__main__":
    main()
