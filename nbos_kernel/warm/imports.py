"""Importing ahead, with an eye on what would make a later fork, or a later environment, differ from a fresh start.

Found out, not assumed: threads that a fork leaves behind (a trial fork tells: libraries made for forks, OpenBLAS for
one, end theirs by themselves), descriptors that stay open, and names of the environment that were read.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

OURS = "nbos_kernel.app"
STARTING = (
    "ipykernel.debugger",
    "debugpy.server.api",
    "IPython.core.completerlib",
    "IPython.core.debugger",
    "IPython.core.logger",
    "IPython.core.magics",
    "IPython.extensions.storemagic",
    "faulthandler",
    "psutil",
    "sqlite3",
    "tornado.platform.asyncio",
    "tornado.queues",
)
"""What a replica imports between its start and its first cell. Some of it is not everywhere."""

SETTLE = 0.5
"""Seconds that a thread which was joined may still be seen."""


@dataclass
class Imported:
    """What came of it. failed: of the chosen modules, with the reason. reads: names that were looked up in the
    environment. unsafe: why this process must not be forked, empty when it may. resident: bytes of resident memory that
    the chosen modules take: nobody's limit should count them."""

    failed: dict[str, str] = field(default_factory=dict)
    reads: set[str] = field(default_factory=set)
    unsafe: str = ""
    resident: int = 0


def import_all(chosen: Iterable[str], allowed: Iterable[int]) -> Imported:
    """Import what replicas start with, and the modules that the site chose. allowed: descriptors that may be open.

    Raises ImportError when a replica cannot run here at all.
    """
    found = Imported()
    with _noting_reads(found.reads):
        importlib.import_module(OURS)
        for name in STARTING:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        _look(found, "what every replica needs", allowed)
        before = _resident()
        for name in chosen:
            try:
                importlib.import_module(name)
            except Exception as err:  # noqa: BLE001 - a module may raise anything; the replica can do without it
                found.failed[name] = f"{type(err).__name__}: {err}"[:300]
            _look(found, name, allowed)
        found.resident = max(0, _resident() - before)
    return found


def _look(found: Imported, name: str, allowed: Iterable[int]) -> None:
    if found.unsafe:
        return
    if staying := _threads_that_stay():
        found.unsafe = f"importing {name} starts {staying} thread(s) that a fork would leave behind"
    elif opened := _descriptors() - set(allowed):
        kinds = ", ".join(sorted(_link(number) for number in opened))
        found.unsafe = f"importing {name} opens what forks would share or lose ({kinds})"


def _threads_that_stay() -> int:
    """Threads besides this one that do not end by themselves when the process forks."""
    if _threads() == 1:
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of what is tried out here
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return _settled(lambda: _threads() - 1)


def _settled(count: Callable[[], int]) -> int:
    deadline = time.monotonic() + SETTLE
    while count() and time.monotonic() < deadline:
        time.sleep(0.005)
    return count()


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> set[int]:
    """Those that are open, without the one that reads the list."""
    return {number for number in map(int, os.listdir("/proc/self/fd")) if _link(number)}


def _link(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


@contextlib.contextmanager
def _noting_reads(names: set[str]) -> Iterator[None]:
    """Note every name that Python code looks up in os.environ (C code's getenv is not seen)."""
    kind = type(os.environ)
    plain = kind.__getitem__

    def noting(self: os._Environ[str], key: str) -> str:
        names.add(os.fsdecode(key))  # os.environb is of the same kind
        return plain(self, key)

    setattr(kind, "__getitem__", noting)  # noqa: B010 - mypy lets nobody assign a method
    try:
        yield
    finally:
        setattr(kind, "__getitem__", plain)  # noqa: B010
