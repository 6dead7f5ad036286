"""What an import would have done differently in this very process, done when its module comes in sight.

Two kinds: what must be another in each process (random numbers, keys), for all modules that were imported ahead, as
soon as the process is a replica; and what a module looks up while it is imported, when it is handed over.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from . import ahead

RENEWED = frozenset({"MPLBACKEND"})
"""Names in the environment that the functions below look up again."""


def renew() -> None:
    """What must be another in each process, made anew where the imports made it.

    Python's `random` is seeded by fork itself. numpy's global generator is not, and would give the same numbers in
    every replica; nor is multiprocessing's key, with which one user could enter another's managers. torch starts
    every process with the same seed, so here as well.
    """
    numbers: Any = ahead.get("numpy.random")
    if numbers is not None:
        numbers.seed()
    processes: Any = ahead.get("multiprocessing.process")
    if processes is not None:
        processes.current_process().authkey = os.urandom(32)


_rc: tuple[str, int, int] | None = None


def prepare() -> None:
    """In the process that imports ahead: what the functions below compare with."""
    global _rc
    matplotlib = ahead.get("matplotlib")
    _rc = _rc_file(matplotlib) if matplotlib is not None else None


def given(name: str, module: ModuleType) -> None:
    if name in _GIVEN:
        _GIVEN[name](module)


def _matplotlib(matplotlib: Any) -> None:
    """It reads a file of settings when it is imported, from the working directory for one; and which way of drawing is
    the default: ipykernel sets that in the environment when the kernel starts."""
    found = _rc_file(matplotlib)
    if found != _rc:
        settings = matplotlib.rc_params_from_file(found[0])
        for kept in (matplotlib.rcParams, matplotlib.rcParamsOrig):
            dict.update(kept, {key: dict.__getitem__(settings, key) for key in settings})
    if os.environ.get("MPLBACKEND"):
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]


def _rc_file(matplotlib: Any) -> tuple[str, int, int]:
    name = matplotlib.matplotlib_fname()
    found = os.stat(name)
    return str(Path(name).absolute()), found.st_mtime_ns, found.st_size


def _torch_cuda(_: Any) -> None:
    """A cell that holds a GPU waits for torch to start CUDA."""
    from nbos_kernel import binding

    binding.torch_is_there()


def _multiprocessing(_: Any) -> None:
    sys.modules["__mp_main__"] = sys.modules["__main__"]


_GIVEN: dict[str, Callable[[Any], None]] = {"matplotlib": _matplotlib, "torch.cuda": _torch_cuda}
_GIVEN["multiprocessing"] = _multiprocessing
