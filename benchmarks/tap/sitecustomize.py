"""Put on the PYTHONPATH of a cluster by `benchmarks/state.py`: replicas leave a line for each stage of an execution.

A line is `n stage pid time bytes`, with the monotonic clock that all processes of a machine share. Nothing of NBOS
knows about it: it wraps the four methods at whose end a stage is over. Processes that are no replicas are left alone.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import time
from typing import Any

PATH = os.environ.get("PYTHON_NBOS_STAMPS", "")


def stamp(n: int, stage: str, size: int = 0) -> None:
    line = f"{n} {stage} {os.getpid()} {time.monotonic():.6f} {size}\n"
    handle = os.open(PATH, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def after(owner: Any, name: str, note: Any) -> None:
    """Call `note(self, result, *args)` whenever `owner.name` has returned."""
    wrapped = getattr(owner, name)
    if inspect.iscoroutinefunction(wrapped):

        @functools.wraps(wrapped)
        async def later(self: Any, *args: Any, **options: Any) -> Any:
            result = await wrapped(self, *args, **options)
            note(self, result, *args)
            return result

        setattr(owner, name, later)
        return

    @functools.wraps(wrapped)
    def at_once(self: Any, *args: Any, **options: Any) -> Any:
        result = wrapped(self, *args, **options)
        note(self, result, *args)
        return result

    setattr(owner, name, at_once)


def tap() -> None:
    from nbos_kernel.execution import Execution
    from nbos_kernel.replica import Replica

    running: dict[str, int] = {}

    def ended(execution: Any, _: Any, *args: Any) -> None:
        if execution.running is not None:
            running["n"] = execution.running.n
            stamp(execution.running.n, "ended")

    def captured(_: Any, taken: Any, *args: Any) -> None:
        fresh = sum(packed.fresh for packed in taken.changes.components)
        stamp(running.get("n", -1), "captured", fresh)

    def committed(_: Any, __: Any, n: int) -> None:
        stamp(n, "committed")

    def applied(_: Any, __: Any, entry: Any, *args: Any) -> None:
        stamp(entry["upto"] if "upto" in entry else entry["n"], "applied")

    after(Execution, "replied", ended)
    after(Replica, "take_changes", captured)
    after(Replica, "own", committed)
    after(Replica, "_apply", applied)


if PATH and {"nbos_kernel", "nbos_kernel.warm"} & set(sys.orig_argv):
    tap()
