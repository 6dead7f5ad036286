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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import ahead, renewal
from .ahead import Ahead
from .tracing import Trace

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
    environment. unsafe: why this process must not be forked, empty when it may; culprit: the chosen module that made it
    so. resident: bytes of resident memory that the chosen modules take: nobody's limit should count them. tops: the
    packages, and modules outside of one, that were imported ahead, and are out of sight now."""

    failed: dict[str, str] = field(default_factory=dict)
    reads: set[str] = field(default_factory=set)
    unsafe: str = ""
    culprit: str = ""
    resident: int = 0
    tops: list[str] = field(default_factory=list)


def import_all(chosen: Iterable[str], allowed: Iterable[int], gently: bool = False) -> Imported:
    """Import what replicas start with, and the chosen modules, which are out of sight afterwards. allowed: descriptors
    that may be open. gently: resting in between.

    Raises ImportError when a replica cannot run here at all.
    """
    found, by_chosen = Imported(), set[str]()
    with noting_reads(found.reads):
        import_needed()
    _look(found, "what every replica needs", allowed)
    before = anonymous()
    trace = Trace(gently)
    with noting_reads(by_chosen), trace.watching():
        for name in chosen:
            _import(name, found)
            _look(found, name, allowed)
    found.resident = max(0, anonymous() - before)
    found.reads |= by_chosen
    _hide(trace, found, by_chosen)
    return found


def ready(found: Imported) -> dict[str, Any]:
    """The message to the daemon."""
    return {"type": "ready", **asdict(found), "reads": sorted(found.reads), "below": READ_BELOW_PYTHON}


def import_needed() -> None:
    """What a replica imports until its first cell. Raises ImportError when it cannot run here at all."""
    importlib.import_module(OURS)
    for name in STARTING:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _import(name: str, found: Imported) -> None:
    try:
        importlib.import_module(name)
    except Exception as err:  # noqa: BLE001 - a module may raise anything; the replica can do without it
        found.failed[name] = f"{type(err).__name__}: {err}"[:300]


def _hide(trace: Trace, found: Imported, by_chosen: set[str]) -> None:
    def reads(name: str) -> bool:
        if name in renewal.RENEWED or name.startswith(SET_BY_US):
            return False
        return name in by_chosen or name.startswith(READ_BY_LIBRARIES)

    hidden = Ahead(trace, reads)
    if not hidden.names:
        return
    hidden.given = renewal.given
    found.tops = ahead.tops(hidden.names)
    ahead.current = hidden
    renewal.prepare()
    hidden.hide(trace.first)


def _look(found: Imported, name: str, allowed: Iterable[int]) -> None:
    if found.unsafe:
        return
    found.unsafe = why_not_forked(name, allowed)
    if found.unsafe:
        found.culprit = name


READ_BY_LIBRARIES = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "GOTO_", "BLIS_", "NUMEXPR_", "NPY_")
"""Beginnings of names that native libraries read by getenv when they are loaded."""
READ_BELOW_PYTHON = (
    "PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_", *READ_BY_LIBRARIES,
    "CUDA_", "NCCL_", "NVIDIA_", "TORCH", "PYTORCH", "C10_", "ATEN_", "XLA_", "TF_",
)  # fmt: skip
"""These, those that the interpreter and the loader read at the start, and those read when a GPU is first used."""
SET_BY_US = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_", "NBOS_")


def why_not_forked(name: str, allowed: Iterable[int]) -> str:
    """What the import of `name` left in this process that a fork would break; '' where nothing."""
    if staying := _threads_that_stay():
        return f"importing {name} starts {staying} thread(s) that a fork would leave behind"
    if opened := _descriptors() - set(allowed):
        kinds = ", ".join(sorted(_link(number) for number in opened))
        return f"importing {name} opens what forks would share or lose ({kinds})"
    return ""


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


MADE_FOR_FORKS = frozenset({b"jemalloc_bg_thd\n"})
"""Threads that may be left behind: jemalloc (pyarrow has one) goes on without in the child, by its own handlers."""


def _threads() -> int:
    return sum(_name(task) not in MADE_FOR_FORKS for task in Path("/proc/self/task").iterdir())


def _name(task: Path) -> bytes:
    try:
        return (task / "comm").read_bytes()
    except OSError:
        return b""  # it ends just now


def anonymous() -> int:
    """Bytes of resident memory of its own: what a fork has from its start. Pages of files that are mapped it has
    only as it uses them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def _descriptors() -> set[int]:
    """Those that are open, without the one that reads the list."""
    return {number for number in map(int, os.listdir("/proc/self/fd")) if _link(number)}


def _link(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


@contextlib.contextmanager
def noting_reads(names: set[str]) -> Iterator[None]:
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
