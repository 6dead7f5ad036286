"""Running code of the user beside the cell that the user sees: nothing of it reaches the frontend or the history.

Guarantees: within `hushed`, what this thread prints or displays is dropped, errors are not shown, `%` lines are not
recorded; other threads print as ever. Afterwards everything is as before, and streams that the code has kept (a logging
handler) write for real.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

Cancelling = Callable[["asyncio.Future[Any]"], AbstractContextManager[Any]]
"""For the time of its block, an interrupt cancels the future."""


class _Gate:
    """A stream; what the thread that made it writes is dropped until `open` is set."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread, self.open = stream, threading.get_ident(), False

    def write(self, text: str) -> int:
        if self.open or threading.get_ident() != self._thread:
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def hushed(shell: Any) -> Iterator[None]:
    """`shell`: the IPython shell that runs the code."""
    with ExitStack() as stack:
        for stream in ("stdout", "stderr"):
            gate = _Gate(getattr(sys, stream))
            stack.callback(setattr, sys, stream, getattr(sys, stream))
            stack.callback(setattr, gate, "open", True)
            setattr(sys, stream, gate)
        here = threading.get_ident()
        for name in ("publish", "clear_output"):
            shown = getattr(shell.display_pub, name)
            stack.enter_context(_instead(shell.display_pub, name, _elsewhere(shown, here)))
        for name in ("showtraceback", "showsyntaxerror", "showindentationerror"):
            stack.enter_context(_instead(shell, name, _elsewhere(getattr(shell, name), here)))
        kept = {name: getattr(shell, name, None) for name in ("last_execution_result", "last_execution_succeeded")}
        kept["settings"] = getattr(shell, "settings", None)
        for name, value in kept.items():
            stack.callback(setattr, shell, name, value)
        shell.settings = None
        stack.callback(shell.payload_manager.clear_payload)
        yield


def _elsewhere(call: Callable[..., Any], here: int) -> Callable[..., Any]:
    """`call` on other threads (subshells); nothing on this one."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) if threading.get_ident() != here else None

    return called


@contextmanager
def _instead(owner: Any, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """`owner.name` is `call`, by an attribute of the object that hides the class's."""
    before = vars(owner).get(name)
    setattr(owner, name, call)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


async def run(shell: Any, code: str, cancelling: Cancelling) -> BaseException | None:
    """Run a cell as ipykernel does, `await` at its top level included; the error that ended it."""
    problem = None
    try:
        transformed = shell.transform_cell(code)
    except Exception:  # noqa: BLE001 - a transformer of the user; IPython gives the cell this error
        transformed, problem = code, sys.exc_info()
    options = {"transformed_cell": transformed, "preprocessing_exc_tuple": problem}
    with hushed(shell):
        if not shell.should_run_async(code, **options):
            result = shell.run_cell(code, store_history=False, silent=True)
            return _error(result)
        future = asyncio.ensure_future(shell.run_cell_async(code, store_history=False, silent=True, **options))
        with cancelling(future):
            try:
                return _error(await future)
            except asyncio.CancelledError as err:
                return err
            finally:
                shell.events.trigger("post_execute")


def _error(result: Any) -> BaseException | None:
    error: BaseException | None = result.error_before_exec or result.error_in_exec
    return error
