"""Whether a module may be imported ahead for people who did not ask for it: tried out in a process of its own, which
ends afterwards and which no replica is forked from.

A module passes when it, and all that its import loads, lies in this Python's own folders of installed packages (not in
a home folder, on a path that somebody added, or behind a link out of them), and its import does nothing but make
definitions: no output, no network, no program, no file written, nothing read from a home folder, no thread or
descriptor left, no question whether it runs in a notebook, no setting of the process changed but those that
`ahead` can take back and do again (filters of warnings, the environment, finders at the end of `sys.meta_path`).
The first that does not pass ends the process, since what it did stays done; the daemon asks about the others anew.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import locale
import logging
import os
import pwd
import random
import resource
import signal
import site
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .imports import anonymous, import_needed, why_not_forked

DOES = {
    "socket.connect": "opens network connections", "socket.bind": "opens network connections",
    "socket.getaddrinfo": "opens network connections", "socket.sendto": "opens network connections",
    "subprocess.Popen": "starts programs", "os.system": "starts programs", "os.exec": "starts programs",
    "os.posix_spawn": "starts programs", "os.spawn": "starts programs", "os.startfile": "starts programs",
    "webbrowser.open": "starts programs", "os.kill": "signals processes", "os.killpg": "signals processes",
    "os.remove": "changes files", "os.rename": "changes files", "os.rmdir": "changes files", "os.link": "changes files",
    "os.symlink": "changes files", "os.mkdir": "changes files", "os.truncate": "changes files",
    "os.chmod": "changes files", "os.chown": "changes files", "shutil.rmtree": "changes files",
}  # fmt: skip
"""Audit events (PEP 578) of what an import may not do."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SETTINGS_OF_THEIR_OWN = {"matplotlib": "matplotlib"}
"""Packages that read folders of this name in a home folder when they are imported; `renewal` looks at these again."""


def judge_all(modules: list[str], own: socket.socket) -> None:
    """Tell of each module, in turn, whether it passed; end with the first that did not."""
    _after_everybody()
    import_needed()
    judge = Judge(allowed=(0, 1, 2, own.fileno()))
    for name in modules:
        began, before = time.process_time(), anonymous()
        reason = judge.reason(name)
        told = {"module": name, "reason": reason[:300], "seconds": time.process_time() - began}
        own.send(json.dumps({"type": "judged", **told, "size": max(0, anonymous() - before)}).encode())
        if reason:
            return


def _after_everybody() -> None:
    """Whoever else wants the processor goes first; also where Linux shares it among sessions (sched(7), autogroup)."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


class Judge:
    """`reason` says why a module may not be imported ahead, '' when it may. allowed: descriptors that may be open."""

    def __init__(self, allowed: tuple[int, ...]) -> None:
        self._allowed = allowed
        self._folders, self._homes = installed_folders(), _homes()
        self._python = tuple(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix))
        self._settings = ""
        self._did: list[str] = []
        self._watching = False
        self._thread = threading.get_ident()
        _watch_calls(self._did, lambda: self._watching)
        sys.addaudithook(self._hear)

    def reason(self, name: str) -> str:
        if why := self._out_of_place(name):
            return why
        before, loaded, printed = _settings(), set(sys.modules), _printed()
        self._did.clear()
        self._settings = SETTINGS_OF_THEIR_OWN.get(name.partition(".")[0], "")
        self._watching = True
        try:
            importlib.import_module(name)
        except BaseException as err:  # noqa: BLE001 - whatever it raises, SystemExit included, is why it does not pass
            return f"{type(err).__name__}: {err}"
        finally:
            self._watching = False
        if self._did:
            return f"when it is imported, it {self._did[0]}"
        if _printed() != printed:
            return "when it is imported, it prints something"
        for setting, value in _settings().items():
            if value != before[setting]:
                return f"when it is imported, it changes {setting}"
        return self._foreign(loaded) or why_not_forked(name, self._allowed)

    def _out_of_place(self, name: str) -> str:
        """By where it would be loaded from; nothing of it has run."""
        top = name.partition(".")[0]
        if "__main__" in name.split("."):
            return "it is a program"
        spec = importlib.machinery.PathFinder.find_spec(top)
        if spec is None or spec.origin is None or not spec.has_location:
            return "it is not in this Python's folders of installed packages"
        if why := self._elsewhere(spec.origin):
            return why
        found = os.stat(spec.origin)
        if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o002:
            return f"others may write to {spec.origin}"
        return ""

    def _elsewhere(self, file: str, folders: tuple[str, ...] = ()) -> str:
        real = os.path.realpath(file)
        if real.startswith(tuple(folder + os.sep for folder in folders or self._folders)):
            return ""
        return f"it is {real}, not in this Python's folders of installed packages"

    def _foreign(self, loaded: set[str]) -> str:
        everywhere = (*self._folders, *(os.path.realpath(sysconfig.get_path(n)) for n in ("stdlib", "platstdlib")))
        for name in sys.modules.keys() - loaded:
            if sys.modules[name] is sys.modules["__main__"]:
                continue  # this trial, by the name that multiprocessing gives it (`ahead` puts it right)
            file = getattr(sys.modules[name], "__file__", None)
            if isinstance(file, str) and (why := self._elsewhere(file, everywhere)):
                return f"it loads {name}: {why}"
        return ""

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching or threading.get_ident() != self._thread:
            return
        if event == "open":
            self._opened(*arguments)
        elif event in DOES:
            path = str(arguments[0]) if arguments else ""
            harmless = "__pycache__" in path or (event == "os.mkdir" and os.path.isdir(path))
            if not harmless:
                self._did.append(f"{DOES[event]} ({event} {path[:100]})")

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int) or not isinstance(flags, int):
            return
        file = os.fsdecode(path)
        if flags & WRITES:
            if "__pycache__" not in file and file != os.devnull:
                self._did.append(f"writes {file}")
            return
        real = os.path.realpath(file)
        inside = real.startswith(tuple(folder + os.sep for folder in (*self._python, *self._folders)))
        known = self._settings and self._settings in Path(real).parts
        if real.startswith(tuple(home + os.sep for home in self._homes)) and not inside and not known:
            self._did.append(f"reads {file}, in a home folder")


def installed_folders() -> tuple[str, ...]:
    """Where the packages of this Python lie, without the one of the user's own."""
    paths = {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return tuple(sorted(os.path.realpath(path) for path in paths))


def _homes() -> tuple[str, ...]:
    found = {pwd.getpwuid(os.getuid()).pw_dir, os.environ.get("HOME", ""), "/home"}
    return tuple(sorted(os.path.realpath(home) for home in found if len(home) > 1))


def _watch_calls(did: list[str], watching: Callable[[], bool]) -> None:
    """What is asked of IPython is answered otherwise in a notebook; who sets a seed wants the same numbers always."""
    import IPython
    from IPython.core import getipython
    from IPython.core.interactiveshell import InteractiveShell

    def get_ipython() -> None:
        if watching():
            did.append("asks whether it runs in a notebook")

    def initialized() -> bool:
        get_ipython()
        return False

    plain = random.seed

    def seed(a: Any = None, *more: Any) -> None:
        if watching() and a is not None:
            did.append("seeds random numbers")
        plain(a, *more)

    random.seed = seed  # type: ignore[assignment]
    IPython.get_ipython = getipython.get_ipython = get_ipython
    InteractiveShell.initialized = initialized


def _settings() -> dict[str, Any]:
    """What belongs to the whole process, and would differ in replicas whose code did not import the module."""
    return dict(_read_settings())


def _read_settings() -> Iterator[tuple[str, Any]]:
    yield "the working directory", os.getcwd()
    yield "sys.path", (list(sys.path), list(sys.path_hooks))
    yield "how modules are found", list(sys.meta_path)[: sys.meta_path.index(importlib.machinery.PathFinder) + 1]
    yield "sys's hooks", (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook)
    yield "standard output", (sys.stdin, sys.stdout, sys.stderr)
    yield "tracing", (sys.gettrace(), sys.getprofile())
    yield "Python's limits", (sys.getrecursionlimit(), sys.getswitchinterval())
    yield "garbage collection", (gc.isenabled(), gc.get_threshold())
    yield "signal handlers", [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    yield "the locale", locale.setlocale(locale.LC_ALL)
    yield "socket timeouts", socket.getdefaulttimeout()
    yield "logging", (logging.root.level, list(logging.root.handlers), logging.root.manager.disable)
    yield "builtins", sorted(vars(sys.modules["builtins"]))
    yield "resource limits", [resource.getrlimit(n) for n in (resource.RLIMIT_NOFILE, resource.RLIMIT_STACK)]


def _printed() -> list[int]:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return [os.fstat(number).st_size for number in (1, 2)]
