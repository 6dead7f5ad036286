"""Large values that a standby leaves in the store until somebody looks them up (the option `lazy` of a kernel).

Guarantees: what the user sees is what a replica that holds everything shows: before code runs, every name that it can
look up is loaded (`capture/unloaded.py`); a lookup that still misses loads (`lost.py`), and so does an attribute of
`__main__`. A value that nobody looks up is never fetched, and stays in the log as it is. A component is loaded whole
or not at all, and never over a variable that was bound meanwhile. What cannot be loaded for good is a lost name with
its reason; what the store cannot give now stays unloaded, and the lookup says so.

Any thread may load; one at a time does. What this does to IPython itself stands in `lazyshell.py`.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from .. import binding
from ..capture import devicedata, names
from ..capture.changes import Capture, why_not
from ..capture.loaded import Met
from ..capture.pickling import Roots, load_meeting
from ..capture.quiet import quiet
from ..capture.unloaded import OFF, Table, Unloaded, may_wait, needed, words_of
from ..entries import Memory, Read, frames_of
from ..history import History
from ..reports.progress import listing, size

LOUD = 256 << 20
"""Bytes from which loading says what a cell waits for."""

PEEK = 256 << 20
"""Bytes that completion and inspection load without being told to: a fraction of a second."""

FOREVER = "cannot be loaded on this replica: "


class NotLoadedError(NameError):
    """The variable exists, and its value cannot be fetched now."""


class BlobMissing(Exception):
    """The daemon cannot give a blob. `again`: asking later may help."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that never waits for an event loop."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    work.close()
    raise RuntimeError("a blocking read waited for the event loop")


class Lazy:
    """`read` fills memory with blobs, and blocks instead of waiting. `threshold`: bytes of a component from which it
    stays unloaded; OFF: all are loaded."""

    def __init__(self, shell: Any, roots: Roots, capture: Capture, history: History, read: Read) -> None:
        self._shell, self._roots, self._capture, self._history, self._read = shell, roots, capture, history, read
        self.threshold = OFF
        self.table = Table()
        self.tell: Callable[[str], None] = _tell
        self.guard = False
        """Whether functions that are made now have to be able to load what they look up (`lost.py`)."""
        self._mentions: dict[str, frozenset[str]] = {}
        self._lock = threading.RLock()
        self._log = logging.getLogger(__name__)

    @property
    def on(self) -> bool:
        return self.threshold > OFF

    # Applying the log --------------------------------------------------------------------------------------------

    def takes(self, component: Mapping[str, Any]) -> bool:
        """Whether a component of an entry stays unloaded here."""
        return may_wait(component, self.threshold)

    def adopt(self, replaced: Iterable[str], whole: bool, kept: Iterable[Unloaded]) -> None:
        """An entry was applied: `kept` of it is not loaded, `replaced` are all names that it wrote or deleted."""
        with self._lock:
            if whole:
                self.table.clear()
                self._mentions.clear()
            replaced = list(replaced)
            self.table.forget(replaced)
            for each in kept:
                self.table.put(each)
                for name in each.names:
                    self._mentions.pop(name, None)
                    self._roots.namespace.pop(name, None)  # also "_", which IPython keeps bound
            self._capture.away(self.table)

    def met(self, loaded: Iterable[str], mentions: Iterable[str]) -> None:
        """What the functions in a component name that was loaded here."""
        if self.on:
            self._mentions.update(dict.fromkeys(loaded, frozenset(mentions)))

    def reconcile(self) -> None:
        """Names that were bound since are the user's again. Before every capture."""
        self.guard = bool(self.table)
        if not self.table:
            return
        with self._lock:
            bound = [name for name in self.table if name in self._roots.namespace]
            self.table.forget(bound)
            self._capture.here(bound)

    # Loading -----------------------------------------------------------------------------------------------------

    def before(self, code: str, expressions: Iterable[str] = ()) -> None:
        """Code is about to run: load what it can look up. Raises NotLoadedError when that is not to be had now."""
        if self.table:
            words = words_of(code).union(*map(words_of, expressions))
            words.update(word for unit in self._capture.exposed() for word in unit.mentions or ())
            self.load(self._needed(words))

    def before_callback(self) -> None:
        """A message to a callback of the notebook came: load what any function of the notebook names."""
        if self.table:
            words = {word for said in self._mentions.values() for word in said}
            words.update(word for unit in self._capture.units.values() for word in unit.mentions or ())
            self.load(self._needed(words))

    def peek(self, code: str) -> bool:
        """Load what completion or inspection of `code` looks at, when that is quick. Whether it is all there."""
        wanted = self._needed(words_of(code)) if self.table else set()
        if sum(each.size for each in self.table.of(wanted)) > PEEK:
            return False
        try:
            self.load(wanted)
        except NotLoadedError as err:
            self._log.info("NBOS: %s", err)
            return False
        return True

    def load_all(self) -> None:
        self.load(self.table)

    def load(self, some: Iterable[str]) -> None:
        """Load the components of those of these names that are not loaded, and of what their functions name."""
        if not self.table:
            return
        with self._lock:
            waiting = self.table.of(some)
            while waiting:
                self._say(waiting)
                loaded = {name for each in waiting for name in each.names}
                for each in waiting:
                    if not each.loading:
                        self._load(each)
                waiting = [each for each in self.table.of(self._needed(loaded)) if not each.loading]

    def fetch(self, name: str) -> Any:
        """The value of a name that is not loaded. KeyError when there is none: lost now, or never here."""
        with self._lock:
            unloaded = self.table.get(name)
            if unloaded is None or unloaded.loading:
                return self._roots.namespace[name]
            self._say([unloaded])
            self._load(unloaded)
            return self._roots.namespace[name]

    def rows(self) -> list[dict[str, Any]]:
        """For `%nbos state`."""
        found = [(sorted(each.names), each.size) for each in self.table.of(self.table)]
        why = "in the store until something looks it up"
        return [{"names": some, "size": count, "state": "not loaded", "reason": why} for some, count in found]

    # ------------------------------------------------------------------------------------------------------------

    def _needed(self, words: Iterable[str]) -> set[str]:
        return needed(words, self.table, self._roots.namespace, self.mentioned)

    def mentioned(self, name: str) -> Iterable[str] | None:
        """What the functions in a variable's component name; None when nobody knows."""
        value = self._roots.namespace[name]
        if names.is_atom(value) or names.is_ipythons(name, value, self._shell.user_ns_hidden):
            return ()
        unit = self._capture.units.get(name)
        if unit is not None:
            return unit.mentions
        return self._mentions.get(name)

    def _say(self, waiting: list[Unloaded]) -> None:
        total = sum(each.size for each in waiting)
        if total >= LOUD:
            some = sorted({name for each in waiting for name in each.names if not name.startswith("_")})
            self.tell(f"NBOS: loading {size(total)} of {listing(some)}, which this replica left in the store")

    def _load(self, unloaded: Unloaded) -> None:
        unloaded.loading, of_device = True, False
        try:
            # Memory of its own: only while a replica runs no cell is it known what loaded memory holds.
            frames = finish(frames_of(unloaded.component, unloaded.payload, self._read, Memory()))
            met, before = Met(), devicedata.met()
            with quiet():
                values = load_meeting(frames[0], frames[1:], self._roots, met)
            del frames
            of_device = devicedata.met() != before
            self._put(unloaded, values, met.mentions)
            if of_device:
                self._capture.on_device.update(values.keys() & unloaded.names)
        except BlobMissing as err:
            if err.again:
                raise _later(unloaded, str(err)) from err
            self._lose(unloaded, str(err))
        except MemoryError as err:
            raise _later(unloaded, f"{size(unloaded.size)} of memory are not to be had") from err
        except KeyboardInterrupt:
            raise
        except BaseException as err:  # noqa: BLE001 - the user's __setstate__ may raise anything; as when applying
            self._lose(unloaded, why_not(err, err))
        finally:
            unloaded.loading = False
        binding.bring_parked(touched=of_device)

    def _put(self, unloaded: Unloaded, values: Mapping[str, Any], mentions: set[str]) -> None:
        namespace = self._roots.namespace
        found = {name: values[name] for name in unloaded.names if name not in namespace}
        self.met(found, mentions)
        namespace.update(found)
        self._history.results(found, ())
        self._capture.here(list(unloaded.names))
        self.table.forget(list(unloaded.names))

    def _lose(self, unloaded: Unloaded, reason: str) -> None:
        gone = [name for name in unloaded.names if name not in self._roots.namespace]
        self._log.warning("NBOS: %s %s%s", ", ".join(gone), FOREVER, reason)
        self.table.forget(list(unloaded.names))
        self._capture.note(dict.fromkeys(gone, FOREVER + reason))


def _later(unloaded: Unloaded, reason: str) -> NotLoadedError:
    some = sorted(unloaded.names)
    text = f"{listing(some)}: not loaded on this replica yet, and not to be had now: {reason}; run the cell again"
    return NotLoadedError(text, name=some[0] if some else None)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
