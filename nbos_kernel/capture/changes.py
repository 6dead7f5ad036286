"""What a cell changed in the namespace, against what the log holds.

Guarantees: `Capture.changes()` finds every change of a variable that the cell, or anything that ran since, could have
made, whatever way it was made; it neither prints nor raises, however the values behave; a value that cannot be
pickled costs its own name only, with the reason. Nothing is remembered until `accept()`, so that a capture whose
execution was not claimed is simply forgotten.

Cost: values that can neither change nor share are compared by identity. Of the other components only those are
pickled again that the code could have touched (`touch.py`) or that somebody outside the notebook refers to
(`seal.py`); large buffers in them are recognised chunk by chunk (`buffers.py`). docs/state.md has the reasoning.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import arrays, buffers, groups, hidden, names, seal, touch
from .buffers import FrameData, Marks
from .pickling import Pickled, Roots, dump
from .quiet import quiet

_ABSENT = object()

NOT_LOOKED_INTO = "not looked into yet"

ATOMS_ALONE = 256
OBJECTS_ALONE = 1024
"""Up to so many new plain values, and so many objects, each stands in a component of its own. Beyond it an entry could
not name them all, so they are put together, always the same names."""


@dataclass(frozen=True)
class Packed:
    """Variables pickled together. The digest covers names, stream and buffers."""

    names: tuple[str, ...]
    digest: str
    frames: tuple[FrameData, ...]

    @property
    def size(self) -> int:
        return sum(frame.size for frame in self.frames)

    @property
    def fresh(self) -> int:
        """Bytes in chunks that were not there before."""
        return sum(frame.fresh for frame in self.frames)


@dataclass
class Unit:
    """Variables that are examined together, as they were when the log last agreed with them."""

    names: tuple[str, ...]
    identities: dict[str, int]
    digest: str = ""
    marks: tuple[Marks, ...] = ()
    exposed: str = NOT_LOOKED_INTO
    mentions: frozenset[str] | None = None
    skip: int = 0
    """Examinations to come that need no new look into it: one that stays exposed is looked into ever more rarely."""
    patience: int = 1

    @property
    def size(self) -> int:
        return sum(marks.size for marks in self.marks)


@dataclass
class Changes:
    """What has to be written: components anew or changed, names gone, names that newly cannot be replicated.

    `units`: how the examined variables stand now; `atoms`, `settings`: all that are compared by value; `again`: names
    that the next capture has to examine, because they found no room in this entry.
    """

    components: list[Packed] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    atoms: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    again: set[str] = field(default_factory=set)
    examined: int = 0

    def __bool__(self) -> bool:
        return bool(self.components or self.deleted or self.lost)


class Capture:
    """`variables()` gives the user's (name, value) pairs at this moment; `copies()` what else IPython itself holds
    of them (its own caches of results)."""

    def __init__(
        self,
        roots: Roots,
        variables: Callable[[], Iterable[tuple[str, Any]]],
        settings: hidden.Hidden | None = None,
        copies: Callable[[], Iterable[Any]] = lambda: (),
    ) -> None:
        self._roots, self._variables, self._hidden, self._copies = roots, variables, settings, copies
        self._atoms: dict[str, Any] = {}  # the very objects the log holds, kept so that identity means something
        self._digests: dict[str, str] = {}  # of the component each name stands in
        self._units: dict[str, Unit] = {}
        # What every fresh replica has alike; random states differ and are written by the first cell.
        self._settings = settings.values() if settings is not None else {}
        for name in [name for name in self._settings if name.endswith("random")]:
            del self._settings[name]
        self._latest: dict[str, int] = {}
        self._absent: set[str] = set()  # names this replica never had: not being there is no deletion
        self._words: set[str] = set()
        self._everything = False
        self.lost: dict[str, str] = {}
        self.written: dict[str, int] = {}
        """What the last accepted changes wrote: bytes by component."""

    def note_source(self, code: str) -> None:
        """Code that runs now, or ran: what it names may be changed. Also remembers which submodules it imports by
        name: the variable it binds is only the package."""
        self._words |= touch.cell_words(code)
        if "import" not in code or "." not in code:
            return
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return  # the cell says so itself
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._roots.imported.update(alias.name for alias in node.names if "." in alias.name)

    def examine_all(self) -> None:
        """Trust nothing at the next capture."""
        self._everything = True

    def changes(self) -> Changes:
        """Compare the namespace with what the log holds."""
        found = Changes()
        if self._hidden is not None:
            found.settings = self._hidden.values()  # not within quiet(), which changes what warnings are shown
        with quiet():
            current = self._namespace()
            labels = self._unwritable(current, found)
            objects = self._compare_atoms(current, found)
            self._compare_objects(objects, found)
            if self._hidden is not None:
                self._compare_settings(found)
        known = (self._digests.keys() | self.lost.keys()) - self._absent
        found.deleted = sorted(known - current.keys() - found.settings.keys() - labels)
        return found

    def accept(self, found: Changes) -> None:
        """The changes are in the log (or will be): compare with them from now on."""
        for packed in found.components:
            for name in packed.names:
                self._digests[name] = packed.digest
                self.lost.pop(name, None)
                self._absent.discard(name)
        for name in found.deleted:
            self._digests.pop(name, None)
            self.lost.pop(name, None)
        for name, reason in found.lost.items():
            self._digests.pop(name, None)
            self._absent.discard(name)
            self.lost[name] = reason
        for name in [*found.deleted, *found.atoms]:
            self._units.pop(name, None)
        for unit in found.units:
            self._units.update(dict.fromkeys(unit.names, unit))
        self._atoms, self._settings = found.atoms, found.settings
        self._trust_no_more(found.again)
        self._words, self._everything = set(), False
        self._latest = {name: id(self._roots.namespace.get(name)) for name in names.LATEST}
        self.written = {", ".join(packed.names): packed.fresh for packed in found.components}

    def lose(self, lost: Mapping[str, str]) -> None:
        """What accepted changes said is in the log could not be put there."""
        self._trust_no_more(lost)
        for name, reason in lost.items():
            self._digests.pop(name, None)
            self.lost[name] = reason

    def note(self, lost: Mapping[str, str]) -> None:
        """Keep these as lost, although they are no variables: they do not end because the namespace lacks them."""
        self.lost.update(lost)
        self._absent.update(lost)

    def forget(self, noted: Iterable[str]) -> None:
        """What `note` said holds no more."""
        for name in noted:
            self.lost.pop(name, None)
            self._absent.discard(name)

    def packed(self, values: dict[str, Any]) -> Packed:
        """A component of values that are no variables."""
        found = Changes()
        self._emit(Unit(tuple(values), {}), dump(values, self._roots, arrays.Storages()), (), found)
        (packed,) = found.components
        return packed

    def _trust_no_more(self, some: Iterable[str]) -> None:
        for name in some:
            self._units.pop(name, None)
            self._atoms.pop(name, None)
            self._settings.pop(name, None)

    def adopt(
        self,
        digests: Mapping[str, str],
        deleted: Iterable[str],
        lost: Mapping[str, str],
        missing: Mapping[str, str],
        whole: bool,
    ) -> None:
        """An entry of another executor was applied: this is what the log holds now. `whole`: it replaced
        everything.

        `lost`: what the log says cannot be replicated; `missing`: what could not be loaded here although the log
        has it.
        """
        if whole:
            self._digests, self.lost, self._absent, self._units, self._atoms = {}, {}, set(), {}, {}
        for name in [*deleted, *digests]:
            self._digests.pop(name, None)
            self.lost.pop(name, None)
            self._absent.discard(name)
            self._units.pop(name, None)
            self._atoms.pop(name, None)
        self._digests.update(digests)
        for name in lost:
            self._digests.pop(name, None)
            self._units.pop(name, None)
        self.lost.update(lost)
        self.lost.update(missing)
        self._absent.update(lost, missing)
        self._words, self._everything = set(), False
        if self._hidden is not None:
            self._settings = self._hidden.values()

    def report(self) -> list[dict[str, Any]]:
        """One row for each component and each lost name: for `%nbos state`. Sizes are bytes of the last capture."""
        rows: list[dict[str, Any]] = []
        for unit in {id(unit): unit for unit in self._units.values()}.values():
            standing = [name for name in unit.names if self._units.get(name) is unit and name not in self.lost]
            if standing:
                row = {"names": standing, "size": unit.size, "state": "replicated", "reason": unit.exposed}
                rows.append(row)
        rows += [
            {"names": [name], "size": 0, "state": "not replicated", "reason": why} for name, why in self.lost.items()
        ]
        small = [name for name in self._atoms if name in self._digests]
        if small:
            rows.append({"names": small, "size": 0, "state": "replicated", "reason": ""})
        return sorted(rows, key=lambda row: -row["size"])

    # Looking into components, while the user thinks --------------------------------------------------------------

    def settle(self) -> Generator[None, None, None]:
        """Find out which components are sealed. A step takes about a millisecond; the namespace may change between
        two runs of this, not during one: close it before a cell runs."""
        pending = {id(unit): unit for unit in self._units.values() if unit.exposed == NOT_LOOKED_INTO}
        for unit in pending.values():
            if any(self._units.get(name) is not unit for name in unit.names):
                continue  # a part of it was written again since
            values = self._values_of(unit)
            if values is None:
                continue
            for step in seal.walk(values, self._held, self._roots.stop):
                if step is not None:
                    unit.exposed, unit.mentions = step.exposed, step.mentions
                    unit.skip = unit.patience if step.exposed else 0
                    unit.patience = min(64, 2 * unit.patience)
                yield

    def _values_of(self, unit: Unit) -> Callable[[], list[Any]] | None:
        def values() -> list[Any]:
            now = self._namespace()
            return [now[name] for name in unit.names]

        namespace = self._namespace()
        if any(_identity(name, namespace.get(name)) != identity for name, identity in unit.identities.items()):
            return None  # rebound since
        del namespace
        return values

    def _namespace(self) -> dict[str, Any]:
        current = dict(self._variables())
        if self._hidden is not None:
            current.update(self._hidden.linked())
        return current

    def _held(self) -> dict[int, int]:
        held: dict[int, int] = {}
        for mapping in (self._roots.namespace.values(), self._copies()):
            for value in mapping:
                held[id(value)] = held.get(id(value), 0) + 1
        return held

    # Comparing ---------------------------------------------------------------------------------------------------

    def _unwritable(self, current: dict[str, Any], found: Changes) -> set[str]:
        """Take the names that the log cannot hold out of `current`; what stands for them among the lost."""
        labels = set()
        for name in [name for name in current if not names.writable(name)]:
            label = names.label(name)
            del current[name]
            labels.add(label)
            self._note_lost((label,), names.why_not_writable(name), found)
        return labels

    def _compare_atoms(self, current: Mapping[str, Any], found: Changes) -> dict[str, Any]:
        fresh: dict[str, Any] = {}
        objects: dict[str, Any] = {}
        for name, value in current.items():
            if self._atoms.get(name, _ABSENT) is value and name in self._digests and not _grew(value, self._roots):
                found.atoms[name] = value
            elif names.is_atom(value):
                found.atoms[name] = fresh[name] = value
            else:
                objects[name] = value
        for group in groups.buckets(fresh, ATOMS_ALONE):
            self._emit_atoms(group, fresh, found)
        return objects

    def _emit_atoms(self, group: tuple[str, ...], values: Mapping[str, Any], found: Changes) -> None:
        pickled = self._attempt({name: values[name] for name in group}, arrays.Storages())
        if not isinstance(pickled, str):
            self._emit(Unit(group, {}), pickled, (), found)
        elif len(group) == 1:
            self._note_lost(group, pickled, found)
        else:  # one of them cannot be pickled, and only that one is lost
            for name in group:
                self._emit_atoms((name,), values, found)

    def _compare_objects(self, objects: dict[str, Any], found: Changes) -> None:
        """Examine what could have changed; what is found in it may name more."""
        examined: dict[str, tuple[Unit, Pickled]] = {}
        done: set[str] = set()
        storages = arrays.Storages()
        for name in self._touched(objects, found):
            if name in done:
                continue
            for unit in self._as_units(name, objects):
                done.update(unit.names)
                found.examined += 1
                pickled = self._attempt({each: objects[each] for each in unit.names}, storages)
                if isinstance(pickled, str):
                    unit = self._fall_apart(unit, objects, storages, pickled, found, examined)
                else:
                    examined[unit.names[0]] = (unit, pickled)
        self._emit_groups(list(examined.values()), objects, storages, found)

    def _fall_apart(
        self,
        unit: Unit,
        objects: Mapping[str, Any],
        storages: arrays.Storages,
        reason: str,
        found: Changes,
        examined: dict[str, tuple[Unit, Pickled]],
    ) -> Unit:
        """One of a unit's variables cannot be pickled: each for itself, so that only that one is lost."""
        for name in unit.names:
            alone = Unit((name,), {name: _identity(name, objects[name])})
            pickled = self._attempt({name: objects[name]}, storages) if len(unit.names) > 1 else reason
            if isinstance(pickled, str):
                self._note_lost((name,), pickled, found)
                found.units.append(alone)
            else:
                examined[name] = (alone, pickled)
        return unit

    def _touched(self, objects: Mapping[str, Any], found: Changes) -> list[str]:
        def reflective(word: str) -> bool:
            value = found.atoms.get(word, _ABSENT)
            if value is _ABSENT:
                value = objects.get(word, _ABSENT)
            return value is not _ABSENT and touch.reflective_value(value)

        reached = None
        if any(_identity(name, objects.get(name)) != self._latest.get(name) for name in names.LATEST):
            self._words.update(names.LATEST)  # IPython moved its results on
        if not self._everything:
            units: Mapping[str, touch.Mentioning] = self._units
            reached = touch.touched(self._words, units, reflective)
        if reached is None:
            return list(objects)
        return [
            name
            for name, value in objects.items()
            if name in reached
            or (unit := self._units.get(name)) is None
            or unit.identities.get(name) != _identity(name, value)
        ]

    def _as_units(self, name: str, objects: Mapping[str, Any]) -> list[Unit]:
        """The unit `name` stands in, as far as it still stands; its variables one by one when one was rebound."""
        unit = self._units.get(name)
        if unit is None:
            return [Unit((name,), {name: _identity(name, objects[name])})]
        there = [each for each in unit.names if each in objects and self._units.get(each) is unit]
        identities = {each: _identity(each, objects[each]) for each in there}
        if len(there) == len(unit.names) and identities == unit.identities:
            again = Unit(unit.names, identities, unit.digest, unit.marks, patience=unit.patience)
            if unit.exposed and unit.exposed != NOT_LOOKED_INTO and unit.skip and name not in self._words:
                again.exposed, again.skip = unit.exposed, unit.skip - 1
            return [again]
        return [Unit((each,), {each: _identity(each, objects[each])}, "", unit.marks) for each in there]

    def _emit_groups(
        self,
        examined: list[tuple[Unit, Pickled]],
        objects: Mapping[str, Any],
        storages: arrays.Storages,
        found: Changes,
    ) -> None:
        singles: dict[str, tuple[Unit, Pickled]] = {}
        for group in groups.groups([pickled for _, pickled in examined]):
            unit, pickled = examined[group[0]]
            if len(group) > 1:
                members = tuple(sorted(name for number in group for name in examined[number][0].names))
                marks = max((examined[number][0] for number in group), key=lambda unit: unit.size).marks
                together = self._together(members, marks, objects, storages)
                if isinstance(together, str):
                    self._note_lost(members, together, found)
                else:
                    self._keep(*together, found)
            elif len(unit.names) > 1 or pickled.buffers or hidden.is_pseudo(unit.names[0]):
                self._keep(unit, pickled, found)
            else:
                singles[unit.names[0]] = unit, pickled
        for names_together in groups.buckets(singles, OBJECTS_ALONE):
            bucket = self._together(names_together, (), objects, storages) if len(names_together) > 1 else ""
            for each in [singles[name] for name in names_together] if isinstance(bucket, str) else [bucket]:
                self._keep(*each, found)

    def _together(
        self, members: tuple[str, ...], marks: tuple[Marks, ...], objects: Mapping[str, Any], storages: arrays.Storages
    ) -> tuple[Unit, Pickled] | str:
        pickled = self._attempt({name: objects[name] for name in members}, storages)
        if isinstance(pickled, str):
            return pickled
        return Unit(members, {name: _identity(name, objects[name]) for name in members}, "", marks), pickled

    def _keep(self, unit: Unit, pickled: Pickled, found: Changes) -> None:
        self._emit(unit, pickled, unit.marks, found)
        found.units.append(unit)

    def _compare_settings(self, found: Changes) -> None:
        for name, value in found.settings.items():
            if name not in self._settings or self._settings[name] != value:
                pickled = self._attempt({name: value}, arrays.Storages())
                if isinstance(pickled, str):
                    self._note_lost((name,), pickled, found)
                else:
                    self._emit(Unit((name,), {}), pickled, (), found)

    def _attempt(self, values: dict[str, Any], storages: arrays.Storages) -> Pickled | str:
        try:
            return dump(values, self._roots, storages)
        except BaseException as err:  # noqa: BLE001 - the user's __reduce__ may raise anything, SystemExit included
            return why_not(err, next(iter(values.values())))

    def _note_lost(self, group: tuple[str, ...], reason: str, found: Changes) -> None:
        for name in group:
            if self.lost.get(name) != reason:
                found.lost[name] = reason

    def _emit(self, unit: Unit, pickled: Pickled, before: tuple[Marks, ...], found: Changes) -> None:
        parts: list[bytes | memoryview] = [pickled.stream, *pickled.buffers]
        frames = tuple(
            buffers.frame(data, _marks_for(number, data, before, len(parts))) for number, data in enumerate(parts)
        )
        digest = hashlib.blake2b(repr(unit.names).encode(), digest_size=16)
        for frame in frames:
            digest.update("".join(frame.hashes).encode())
        unit.mentions = pickled.mentions
        unit.digest, unit.marks = digest.hexdigest(), tuple(frame.marks for frame in frames)
        if any(self._digests.get(name) != unit.digest for name in unit.names):
            found.components.append(Packed(unit.names, unit.digest, frames))


def _identity(name: str, value: Any) -> int:
    return 0 if hidden.is_pseudo(name) else id(value)  # a pseudo-variable's value is gathered anew each time


def _marks_for(number: int, data: bytes | memoryview, before: tuple[Marks, ...], count: int) -> Marks | None:
    """The marks a frame had: at the same place, or else those of a frame of the same size."""
    if len(before) == count:
        return before[number]
    size = memoryview(data).nbytes
    return next((marks for marks in before if marks.size == size), None)


def _grew(value: Any, roots: Roots) -> bool:
    """A package of which a cell imported one more submodule is written again."""
    return type(value).__name__ == "module" and bool(roots.imported) and bool(roots.submodules(value.__name__))


def why_not(err: BaseException, value: Any) -> str:
    """One line that tells the user what kind of value it is and why it stays behind."""
    kind = type(value).__qualname__
    if isinstance(err, RecursionError) or isinstance(err.__cause__, RecursionError):
        return f"{kind}: nested too deeply to be pickled"
    if isinstance(err, MemoryError):
        return f"{kind}: not enough memory to pickle it"
    try:
        text = str(err).strip().splitlines()
    except Exception:  # noqa: BLE001 - the user's exception may fail to print itself
        text = []
    reason = f"{kind}: {text[0] if text else type(err).__name__}"[:300]
    return reason.encode("utf-8", "replace").decode()
