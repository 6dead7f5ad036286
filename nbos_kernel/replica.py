"""This replica's copy of the kernel's state: what it applied of the log, and applying more of it.

Guarantees: entries are applied in order, each all or nothing (everything is unpickled before the namespace
changes, in one step); what cannot be loaded here is a lost name with its reason, and the rest of the entry
stands; the executor never applies an entry of its own to itself.

Runs on the main thread. `arrived` only queues; entries are applied between two shell messages, or right before a
bid.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from . import effects, lost
from .capture import hidden, names
from .capture.changes import Capture, why_not
from .capture.pickling import Roots, load
from .capture.quiet import quiet
from .entries import Memory, Read, frames_of
from .history import History

Message = dict[str, Any]


class BlobMissing(Exception):
    """The daemon cannot give a blob now; the values on it are lost here, with this reason."""


class Replica:
    """`shell`: the IPython shell. `read(hashes, memory, chunk)` fetches from the daemon. `applied` -1: nothing yet."""

    def __init__(self, shell: Any, read: Read, log: logging.Logger) -> None:
        self._shell, self._read, self._log = shell, read, log
        self.roots = Roots(
            {"module": shell.user_module, "shell": shell, "In": shell.user_ns["In"], "Out": shell.user_ns["Out"]},
            shell.user_ns,
        )
        self.hidden = hidden.Hidden(shell)
        self.capture = Capture(
            self.roots,
            lambda: names.user_variables(shell.user_ns, shell.user_ns_hidden),
            self.hidden,
            lambda: names.copies(shell),
        )
        self.memory = Memory()
        self.watcher = effects.Watcher()
        self.history = History(shell)
        self.applied = -1
        self.trouble: dict[str, str] = {}
        """What could not be done here besides variables: %cd, %pip."""
        self._queue: deque[tuple[Message, bytes]] = deque()
        self._turn = asyncio.Lock()

    @property
    def lost(self) -> dict[str, str]:
        """Names that cannot be replicated, or could not be loaded here, with the reason."""
        return {**self.capture.lost, **self.trouble}

    def arrived(self, message: Message, payload: bytes) -> None:
        self._queue.append((message, payload))

    async def catch_up(self, done: Callable[[int, dict[str, str]], None]) -> None:
        """Apply what has arrived, in order; `done(n, lost)` after each."""
        async with self._turn:
            while self._queue:
                message, payload = self._queue.popleft()
                whole = message["type"] == "state"
                entry = message if whole else message.get("entry", message)
                n = entry["upto"] if whole else entry["n"]
                if n <= self.applied:
                    continue
                await self._apply(entry, payload, whole)
                self.applied = n
                done(n, self.lost)

    def own(self, n: int) -> None:
        """Entry n is this replica's own and stands in the log."""
        self.applied = max(self.applied, n)
        self.memory.forget()  # the cell may have written to it

    async def _apply(self, entry: Mapping[str, Any], payload: bytes, whole: bool) -> None:
        if entry.get("kind") == "abandoned":
            return
        changed = entry.get("effects") or {}
        if changed.get("packages"):
            self.trouble.update(await asyncio.to_thread(effects.install, changed["packages"]))
        self.trouble.update(self.watcher.apply(changed))
        values, digests, missing = await self._load(entry.get("components") or (), payload)
        gone = list(entry.get("deleted") or ())
        whole = whole or entry.get("kind") == "reset"
        self._put(values, {*gone, *(entry.get("lost") or {}), *missing}, whole)
        self.capture.adopt(digests, gone, entry.get("lost") or {}, missing, whole)
        lost.install(self._shell.user_ns, self.capture.lost)
        self.history.record(entry, whole)

    async def _load(self, components: Any, payload: bytes) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
        values: dict[str, Any] = {}
        digests: dict[str, str] = {}
        missing: dict[str, str] = {}
        for component in components:
            digests.update(dict.fromkeys(component["names"], component["digest"]))
            try:
                frames = await frames_of(component, payload, self._read, self.memory)
                with quiet():
                    loaded = load(frames[0], frames[1:], self.roots)
                # A fold narrows `names` when one of them was written again later: the stream's other values are old.
                values.update({name: loaded[name] for name in component["names"]})
            except BaseException as err:
                if isinstance(err, asyncio.CancelledError):
                    raise
                reason = "cannot be loaded on this replica: " + why_not(err, err)
                self._log.warning("NBOS: %s %s", ", ".join(component["names"]), reason)
                missing.update(dict.fromkeys(component["names"], reason))
        return values, digests, missing

    def _put(self, values: dict[str, Any], gone: set[str], whole: bool) -> None:
        namespace = self._shell.user_ns
        if whole:
            gone |= {name for name, _ in names.user_variables(namespace, self._shell.user_ns_hidden)} - values.keys()
            gone |= {name for name, _ in self.hidden.linked()} - values.keys()
        pseudo = {name: values.pop(name) for name in list(values) if hidden.is_pseudo(name)}
        for name in gone:
            namespace.pop(name, None)
        namespace.update(values)
        self.trouble.update(self.hidden.apply(pseudo, gone))  # not within quiet(): it would undo warnings' filters
        self.history.results(values, gone)
