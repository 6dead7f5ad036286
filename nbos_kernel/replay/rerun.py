"""Running the cells marked with `%%replay` again, on a replica that takes over without having their variables.

Guarantees:
- nothing runs but what `Records` holds, and only under a claim of this replica, between winning it and the first cell;
  each record at most once between two entries of other executors;
- a replay gives the namespace only variables that are lost here and count for the cell: everything else that it bound,
  deleted or set (working directory, environment, random states, settings) is put back to what was replicated;
- what a replay could not make stays lost, with what went wrong in its reason.

After the claim, not before the bid: only one replica can hold it, so no other one runs cells meanwhile and standbys
that stay standbys run nothing; the cell's grant is bound, so a replay may use the GPU; outputs and interrupts arrive
here. A marked cell that asked for more GPUs than the cell that takes over holds waits for one that holds as much.
"""

from __future__ import annotations

import ast
import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .. import effects, lost, oversize, resources
from ..capture import hidden, touch
from ..capture.changes import Capture
from ..lazy.loading import Lazy, NotLoadedError
from .guard import Guard
from .records import Record, Records

RunAgain = Callable[[str], Awaitable[BaseException | None]]
Tell = Callable[[str], None]

PATIENCE = 1.0
"""Seconds of replaying after which the user is told what the cell waits for."""

MOST_FAILED = 2
"""So many cells in a row that ended with their replica, and nothing is replayed: a replay may be what ends them."""

HINT = (
    "NBOS: where such a variable's cell is cheap and can be repeated, `%%replay` as its first line has a failover run "
    "it again (said once)"
)

_ABSENT = object()
_AGAIN = "; its %%replay cell "


class Rerun:
    """`stored`: names whose values are in the log and only could not be fetched now; no replay makes them."""

    def __init__(
        self,
        shell: Any,
        records: Records,
        capture: Capture,
        lazy: Lazy,
        guard: Callable[[str], Guard],
        settings: hidden.Hidden,
        watcher: effects.Watcher,
    ) -> None:
        self._shell, self._records, self._capture, self._lazy = shell, records, capture, lazy
        self._guard = guard
        self._hidden, self._watcher = settings, watcher
        self.stored: set[str] = set()
        self.replayed: set[str] = set()
        """What the last replay made, until the next capture: it need not be told again that it is not replicated."""
        self._tried: set[str] = set()
        self._hinted = False
        self._failed = 0  # cells that ended with their replica, in a row

    # Of the log ------------------------------------------------------------------------------------------------------

    def applied(self, abandoned: bool) -> None:
        """An entry of another executor stands in the log: this replica is a standby."""
        self._tried.clear()
        self._failed = self._failed + 1 if abandoned else 0

    def own(self) -> None:
        """An entry of this replica stands in the log."""
        self._failed = 0

    def told(self, newly: Mapping[str, str]) -> list[str]:
        """The lines of a cell's output about what is newly lost."""
        covered = self._records.covered
        again = {name: why for name, why in newly.items() if name in covered and name not in self.replayed}
        lines = [
            f"NBOS: {name!r} is not replicated; its %%replay cell makes it anew after a failover" for name in again
        ]
        rest = {name: why for name, why in newly.items() if name not in covered}
        lines = lines[: oversize.SHOWN] + oversize.told(rest)
        if not self._hinted and not covered and any(_is_replayable(name, why) for name, why in rest.items()):
            self._hinted = True
            lines.append(HINT)
        self.replayed.clear()
        return lines

    # Taking over -----------------------------------------------------------------------------------------------------

    async def before_cell(self, held: Mapping[str, Any], run: RunAgain, tell: Tell) -> None:
        """Replay what is due, with the GPUs in `held`. Raises KeyboardInterrupt when the user interrupted it."""
        due = self._due(held)
        if not due:
            return
        begun, made, failed = time.monotonic(), set[str](), 0
        interrupted = threading.Event()
        with _announced(due, self._lost_of, tell), _noted(interrupted):
            for record in due:
                wanted = self._lost_of(record)
                why = "was not run: the replay was interrupted"
                if not interrupted.is_set():
                    why = await self._one(record, wanted, run, tell, interrupted)
                there = {name for name in wanted if name in self._shell.user_ns}
                made |= there
                self._blame(sorted(wanted - there), why)
                if there != wanted and not interrupted.is_set():
                    failed += 1
                    tell(f"NBOS: {_names(wanted - there)} not made again: its %%replay cell {why}")
        lost.install(self._shell.user_ns, self._capture.lost, self._lazy)
        self._records.renewed()
        self.replayed |= made
        if interrupted.is_set():
            tell("NBOS: the replay was interrupted; what it had not made stays unavailable, and the cell was not run")
            raise KeyboardInterrupt
        if made:
            cells = len(due) - failed
            tell(f"NBOS: replayed {_cells(cells)} for {_names(made)} in {time.monotonic() - begun:.1f} s")

    def wants_gpu(self) -> bool:
        """Whether a cell is to run again before the next one that asks for a GPU."""
        return any(
            not resources.covers(resources.NONE, record.resources) and self._lost_of(record)
            for record in self._records.records
        )

    def _lost_of(self, record: Record) -> set[str]:
        namespace, gone = self._shell.user_ns, self._capture.lost
        return {name for name in record.names if name in gone and name not in namespace and name not in self.stored}

    def _due(self, held: Mapping[str, Any]) -> list[Record]:
        """The records to run now, in their order."""
        due: list[Record] = []
        later: set[str] = set()
        for record in self._records.records:
            wanted = self._lost_of(record)
            if not wanted or record.source in self._tried:
                continue
            if later & touch.words(record.source) or not resources.covers(held, record.resources):
                later |= wanted
                asked = "asks for a GPU: it runs again before the first cell that holds as much"
                self._blame(wanted, asked if record.resources else "waits for another one, which asks for a GPU")
                continue
            self._tried.add(record.source)
            if self._failed >= MOST_FAILED:
                last = f"the last {self._failed} cells ended with their replica"
                self._blame(wanted, f"was not run again: {last}, and it may be the cause")
                continue
            due.append(record)
        return due

    async def _one(
        self, record: Record, wanted: set[str], run: RunAgain, tell: Tell, interrupted: threading.Event
    ) -> str:
        """Run one cell and take `wanted` from it; why something may be missing."""
        namespace = self._shell.user_ns
        try:
            self._lazy.before(record.source)
        except NotLoadedError as err:
            return f"was not run: {_line(err)}"
        before, unloaded = dict(namespace), set(self._lazy.table)
        around, guard = _Around(self._hidden, self._watcher), self._guard(record.source)
        self._capture.note_source(record.source)
        there = frozenset(name for name in record.names if name in namespace)
        with _without_definitions(self._shell, there):
            error = await run(record.source)
        if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            interrupted.set()
        taken = {name for name in wanted if name in namespace} if error is None else set()
        _put_back(namespace, before, taken | (unloaded - set(self._lazy.table)))
        changed = guard.put_back()
        around.put_back()
        self._capture.forget(taken)
        if changed:
            tell(f"NBOS: a replay changed {_names(set(changed))} in place, and it is too large, or cannot be put back")
        if interrupted.is_set():
            return "was interrupted"
        if error is None:
            return "ran again without making it"
        return f"failed when it ran again: {_line(error)}"

    def _blame(self, some: Any, why: str) -> None:
        """Put into the reason of lost names why no replay made them."""
        gone = self._capture.lost
        self._capture.note({name: gone.get(name, "").partition(_AGAIN)[0] + _AGAIN + why for name in some})


def _is_replayable(name: str, why: str) -> bool:
    """Whether a cell of the user makes what could not be replicated, and it is not only for want of room."""
    of_ours = why == oversize.NO_ROOM or why.startswith("its data could not be stored")
    return name.isidentifier() and not of_ours


class _Around:
    """What a cell can change outside the namespace, as it was before one ran."""

    def __init__(self, settings: hidden.Hidden, watcher: effects.Watcher) -> None:
        self._hidden, self._watcher = settings, watcher
        self._values = settings.values()
        self._cwd, self._environ, self._path = effects.here()

    def put_back(self) -> None:
        cwd, environ, path = effects.here()
        changed = effects.difference(environ, self._environ)
        if cwd != self._cwd or changed or path != self._path:
            self._watcher.apply({"cwd": self._cwd, "environ": changed, "sys_path": self._path})
        now = self._hidden.values()
        self._hidden.apply({name: value for name, value in self._values.items() if now.get(name) != value}, set())


def _put_back(namespace: dict[str, Any], before: Mapping[str, Any], taken: set[str]) -> None:
    for name in namespace.keys() - before.keys() - taken:
        del namespace[name]
    for name, value in before.items():
        if name not in taken and namespace.get(name, _ABSENT) is not value:
            namespace[name] = value


class _Definitions(ast.NodeTransformer):
    def __init__(self, there: frozenset[str]) -> None:
        self._there, self._thread = there, threading.get_ident()

    def visit_Module(self, node: ast.Module) -> ast.Module:
        if threading.get_ident() != self._thread:
            return node  # a cell in a subshell
        node.body = [statement for statement in node.body if not self._is_there(statement)]
        return node

    def _is_there(self, statement: ast.stmt) -> bool:
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        return isinstance(statement, kinds) and statement.name in self._there and not statement.decorator_list


@contextmanager
def _without_definitions(shell: Any, there: frozenset[str]) -> Iterator[None]:
    """Functions and classes of the cell that are there, replicated, are not defined again: what the cell makes is an
    instance of the class that the notebook has. A decorator may register what it decorates, so it runs again."""
    transformer = _Definitions(there)
    shell.ast_transformers.append(transformer)
    try:
        yield
    finally:
        if transformer in shell.ast_transformers:  # IPython drops one that raised
            shell.ast_transformers.remove(transformer)


@contextmanager
def _announced(due: list[Record], lost_of: Callable[[Record], set[str]], tell: Tell) -> Iterator[None]:
    """A replay that takes longer says so, while it runs."""
    wanted = {name for record in due for name in lost_of(record)}
    text = f"NBOS: this cell waits: after a failover {_cells(len(due))} marked %%replay run again for {_names(wanted)}"
    timer = threading.Timer(PATIENCE, tell, [f"{text}; interrupting gives them up"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _noted(interrupted: threading.Event) -> Iterator[None]:
    """An interrupt that hits no code of the user is remembered."""
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"


def _names(some: set[str]) -> str:
    text = ", ".join(sorted(some))
    return text if len(text) <= 100 else f"{text[:97]}… ({len(some)})"


def _line(error: BaseException) -> str:
    try:
        text = str(error).strip().splitlines()
    except Exception:  # noqa: BLE001 - the user's exception may fail to print itself
        text = []
    said = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return said[:300].encode("utf-8", "replace").decode()
