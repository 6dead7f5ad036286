"""This replica's copy of the kernel's state: what it applied of the log, and applying more of it.

Guarantees: entries are applied in order, each all or nothing (everything is unpickled before the namespace
changes, in one step); what cannot be loaded here is a lost name with its reason, and the rest of the entry
stands; the executor never applies an entry of its own to itself.

Runs on the main thread, but for `arrived`, which only queues; entries are applied between two shell messages, or
right before a bid.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from . import effects, lost, oversize, resources
from .capture import devicedata, hidden, names
from .capture.changes import Capture, Changes, why_not
from .capture.loaded import Loaded, Met
from .capture.pickling import Roots, load_meeting
from .capture.quiet import quiet
from .capture.unloaded import OFF, Unloaded
from .entries import Memory, Read, frames_of
from .gpu import uses
from .history import History
from .imported import Imports
from .lacking import Lacking
from .lazy import shell as lazyshell
from .lazy.loading import BlobMissing, Lazy
from .replay import records as replay
from .replay.guard import Guard
from .replay.records import Records
from .replay.rerun import Rerun
from .reports.written import Ledger, components_of
from .settings import NAME, Settings
from .tables import whole as complete

Message = dict[str, Any]
_ABSENT = object()

FEW = 5
"""Entries that may wait to be applied while cells follow each other at once."""


@dataclasses.dataclass(frozen=True)
class Taken:
    """The changes for one entry, and the lines that tell the user what is not in it."""

    changes: Changes
    effects: Message
    notices: list[str]


class Replica:
    """`shell`: the IPython shell. `read(hashes, memory, chunk)` fetches from the daemon; `read_now` does without an
    event loop. `applied` -1: nothing yet."""

    def __init__(self, shell: Any, read: Read, log: logging.Logger, read_now: Read | None = None) -> None:
        self._shell, self._read, self._log = shell, read, log
        self.roots = Roots(
            {"module": shell.user_module, "shell": shell, "In": shell.user_ns["In"], "Out": shell.user_ns["Out"]},
            shell.user_ns,
        )
        self.settings = Settings(shell)
        self.hidden = hidden.Hidden(shell)
        self.capture = Capture(self.roots, self._variables, self.hidden, lambda: names.copies(shell))
        self.memory = Memory()
        self.watcher = effects.Watcher()
        self.history = History(shell)
        self.lazy = Lazy(shell, self.roots, self.capture, self.history, read_now or read)
        self.ledger = Ledger()
        self.uses = uses.Uses()
        self.imports = Imports()
        self.lacking = Lacking(self.ledger.entry_of)
        self.records = Records(self._of_user, shell.transform_cell)
        self.rerun = Rerun(shell, self.records, self.capture, self.lazy, self._guarded, self.hidden, self.watcher)
        self.applied = -1
        self.trouble: dict[str, str] = {}
        """What could not be done here besides variables: %cd, %pip."""
        self._queue: deque[tuple[Message, bytes]] = deque()
        self._turn = asyncio.Lock()
        self._on_device: set[str] = set()
        """Of the entry that is being applied: the names whose values hold data of a GPU."""

    @property
    def lost(self) -> dict[str, str]:
        """Names that cannot be replicated, or could not be loaded here, with the reason."""
        return {**self.capture.lost, **self.trouble}

    def _guarded(self, source: str) -> Guard:
        return Guard(self.capture, self.roots, lambda values: self.history.results(values, ()), source)

    def _of_user(self) -> Iterable[tuple[str, Any]]:
        return names.user_variables(self._shell.user_ns, self._shell.user_ns_hidden)

    def _variables(self) -> Iterable[tuple[str, Any]]:
        yield from self._of_user()
        yield from self.settings.variable()
        yield from self.records.variable()
        yield from self.uses.variable()

    def take_changes(self, source: str, succeeded: bool = True, asked: Mapping[str, Any] = resources.NONE) -> Taken:
        """What is new since the last call, as one entry can hold it; the log counts as having it from now on.

        `source`: the cell that ran, empty when none did; `asked`: the GPUs it asked for.
        """
        capture, watcher = self.capture, self.watcher
        marked = self.records.ended(source, succeeded, asked, self.history.last())
        capture.forget(marked.changed & self._shell.user_ns.keys())  # so that it is said again what happens to them
        capture.note_source(source)
        self.imports.ran(source)
        self.lazy.reconcile()
        found = self.changes()
        notices = oversize.fit(found, capture.lost)
        done = watcher.changes()
        left = {name: why for name, why in watcher.left.items() if capture.lost.get(name) != why}
        notices += [*marked.told, *self.rerun.told({**found.lost, **left})]
        carried = [name for name in effects.names_of(done) if name in capture.lost and name not in watcher.left]
        changed = found.lost or found.deleted or left or carried or oversize.MORE in capture.lost
        before = dict(capture.lost) if changed else None
        capture.accept(found)
        capture.forget(carried)
        capture.note(left)
        found = dataclasses.replace(found, deleted=[*found.deleted, *carried], lost={**found.lost, **left})
        if before is not None:
            found = oversize.listed(found, capture, before)
        self._guard()
        return Taken(found, done, notices)

    def changes(self) -> Changes:
        """What is not in the log, or is and was lost by the store."""
        self.capture.anew = self.lacking.due()
        return self.capture.changes()

    def leave_unloaded(self, threshold: int) -> None:
        """What the daemon's greeting says, before it pushes anything: components from so many bytes stay unloaded."""
        if threshold > OFF and not self.lazy.on:
            lazyshell.install(self._shell, self.lazy)
        self.lazy.threshold = threshold

    def _guard(self) -> None:
        """Let lookups of names that the namespace does not hold say why, or load them."""
        lost.install(self._shell.user_ns, self.capture.lost, self.lazy)

    def arrived(self, message: Message, payload: bytes) -> None:
        """Called on any thread: what has arrived before a bid is applied before it, whatever the main loop does."""
        self._queue.append((message, payload))

    @property
    def behind(self) -> bool:
        """Whether something has arrived that is not applied yet."""
        return bool(self._queue)

    @property
    def far_behind(self) -> bool:
        """Whether a whole state has arrived, or more entries than quick cells leave behind each other."""
        waiting = list(self._queue)  # the link's thread adds to it
        return len(waiting) > FEW or any(message["type"] == "state" for message, _ in waiting)

    async def catch_up(self, done: Callable[[int, dict[str, str]], None]) -> None:
        """Apply what has arrived, in order; then `done(n, lost)`, once for all."""
        async with self._turn:
            before = self.applied
            while self._queue:
                message, payload = self._queue.popleft()
                whole = message["type"] == "state"
                entry = message if whole else message.get("entry", message)
                n = entry["upto"] if whole else entry["n"]
                if n <= self.applied:
                    continue
                entry, payload = await complete(entry, payload, self._read, self.capture.digests, self._log)
                await self._apply(entry, payload, whole)
                anew = whole or entry.get("kind") == "reset"
                self.ledger.wrote(n, components_of(entry), entry.get("deleted") or (), anew)
                self.applied = n
            if self.applied > before:
                done(self.applied, self.lost)

    def own(self, n: int) -> None:
        """Entry n is this replica's own and stands in the log."""
        self.applied = max(self.applied, n)
        self.memory.forget()  # the cell may have written to it
        self.rerun.own()

    async def _apply(self, entry: Mapping[str, Any], payload: bytes, whole: bool) -> None:
        self.rerun.applied(entry.get("kind") == "abandoned")
        if entry.get("kind") == "abandoned":
            return
        changed = entry.get("effects") or {}
        if changed.get("packages"):
            self.trouble.update(await asyncio.to_thread(effects.install, changed["packages"]))
        self.trouble.update(self.watcher.apply(changed))
        if self.lazy.on and not self.lazy.guard:
            self.lazy.guard = True
            self._guard()  # functions keep the builtins they are made with
        components = list(entry.get("components") or ())
        kept = [Unloaded.of(each, payload) for each in components if self.lazy.takes(each)]
        self.memory.begin([*(name for each in components for name in each["names"]), *(entry.get("deleted") or ())])
        here = [each for each in components if not self.lazy.takes(each)]
        values, digests, missing, loaded = await self._load(here, payload)
        on_device, self._on_device = self._on_device & values.keys(), set()
        unloaded = {name: each.component["digest"] for each in kept for name in each.names}
        digests.update(unloaded)
        gone = list(entry.get("deleted") or ())
        lost_names = {**(entry.get("lost") or {}), **oversize.unlisted(values, digests)}
        whole = whole or entry.get("kind") == "reset"
        lines, records = values.pop(NAME, None), values.pop(replay.NAME, None)
        used = values.pop(uses.NAME, None)
        self._put(values, {*gone, *lost_names, *missing, *unloaded}, whole, lines)
        self.uses.adopt(used, whole)
        self.memory.drop({*gone, *lost_names, *missing, *unloaded})
        self.capture.adopt(digests, gone, lost_names, missing, whole)
        self.capture.loaded(loaded, values)
        self.capture.on_device |= on_device
        self.lazy.adopt([*digests, *gone, *lost_names], whole, kept)
        self.records.adopt(records, gone, whole)
        self._guard()
        self.imports.ran(str(entry.get("source") or ""))
        self.history.record(entry, whole)

    async def _load(
        self, components: Any, payload: bytes
    ) -> tuple[dict[str, Any], dict[str, str], dict[str, str], list[Loaded]]:
        """The values, the digests of their components, what could not be loaded, and what could."""
        values: dict[str, Any] = {}
        found: list[Loaded] = []
        digests: dict[str, str] = {}
        missing: dict[str, str] = {}
        early = []
        for component in components:
            digests.update(dict.fromkeys(component["names"], component["digest"]))
            self.rerun.stored.difference_update(component["names"])
            error = await self._load_one(component, payload, values, found)
            if isinstance(error, NameError):
                early.append(component)  # code of the notebook that runs while it is loaded names another variable
            elif error is not None:
                missing.update(self._missing(component, error))
        for component in early:
            with self._visible(values):
                error = await self._load_one(component, payload, values, found)
            if error is not None:
                missing.update(self._missing(component, error))
        return values, digests, missing, found

    async def _load_one(
        self, component: Mapping[str, Any], payload: bytes, values: dict[str, Any], found: list[Loaded]
    ) -> BaseException | None:
        try:
            frames = await frames_of(component, payload, self._read, self.memory)
            met, before = Met(), devicedata.met()
            with quiet():
                loaded = load_meeting(frames[0], frames[1:], self.roots, met)
            if devicedata.met() != before:
                self._on_device.update(component["names"])
            # A fold narrows `names` when one of them was written again later: the stream's other values are old.
            values.update({name: loaded[name] for name in component["names"]})
            found.append(Loaded.of(component, met))
            self.lazy.met(component["names"], met.mentions)
        except BaseException as err:
            if isinstance(err, asyncio.CancelledError):
                raise
            return err
        return None

    def _missing(self, component: Mapping[str, Any], error: BaseException) -> dict[str, str]:
        reason = "cannot be loaded on this replica: " + why_not(error, error)
        self._log.warning("NBOS: %s %s", ", ".join(component["names"]), reason)
        self.lacking.note(component["names"], reason, error)
        if isinstance(error, BlobMissing) and error.again:
            self.rerun.stored.update(component["names"])
        return dict.fromkeys(component["names"], reason)

    @contextlib.contextmanager
    def _visible(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Within, the namespace has what was loaded; afterwards it is what it was."""
        namespace, before = self._shell.user_ns, {}
        for name in [name for name in values if not hidden.is_pseudo(name)]:
            before[name] = namespace.get(name, _ABSENT)
            namespace[name] = values[name]
        try:
            yield
        finally:
            for name, value in before.items():
                if value is _ABSENT:
                    namespace.pop(name, None)
                else:
                    namespace[name] = value

    def _put(self, values: dict[str, Any], gone: set[str], whole: bool, lines: Any) -> None:
        namespace = self._shell.user_ns
        if whole:
            gone |= {name for name, _ in names.user_variables(namespace, self._shell.user_ns_hidden)} - values.keys()
            gone |= {name for name, _ in self.hidden.linked()} - values.keys()
        pseudo = {name: values.pop(name) for name in list(values) if hidden.is_pseudo(name)}
        for name in gone:
            namespace.pop(name, None)
        namespace.update(values)
        read = {name: pseudo.pop(name) for name in list(pseudo) if self.hidden.is_setting(name)}
        self.trouble.update(self.hidden.apply(pseudo, gone))
        # The lines may use variables and the notebook's magics; what the settings then really were has the last word.
        self.trouble.update(self.settings.apply(lines) if lines is not None else {})
        self.trouble.update(self.hidden.apply(read, set()))  # not within quiet(): it would undo warnings' filters
        self.history.results(values, gone)
