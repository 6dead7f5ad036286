"""One comparison of the namespace with what the log holds of it: which components are written anew.

Guarantees: nothing is remembered outside of the `Changes` it fills; a value that cannot be pickled costs its own name
only. Values that can neither change nor share are compared by identity; of the others only those are pickled again
that the code could have touched (`touch.py`) or that somebody outside the notebook refers to (`seal.py`); variables
that turn out to share an object are put together (`groups.py`).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

from . import arrays, buffers, constants, groups, hidden, names, touch
from .buffers import Marks
from .found import NOT_LOOKED_INTO, Changes, Packed, Unit, why_not
from .known import Known
from .pickling import Pickled, Roots, dump

_ABSENT = object()

ATOMS_ALONE = 256
OBJECTS_ALONE = 1024
"""Up to so many new plain values, and so many objects, each stands in a component of its own. Beyond it an entry could
not name them all, so they are put together, always the same names."""


LONG = 64 * 1024
"""Bytes of a pickle stream from which it is worth looking whether another variable is part of it."""

MOST_ITEMS = 256
"""Items of a container that are looked at for this."""


class _Examined:
    """What was pickled in this comparison, by the first name of each; the long ones apart, as they are few."""

    def __init__(self) -> None:
        self.all: dict[str, tuple[Unit, Pickled]] = {}
        self.long: dict[str, Pickled] = {}

    def add(self, unit: Unit, pickled: Pickled) -> None:
        self.all[unit.names[0]] = (unit, pickled)
        if len(pickled.stream) > LONG:
            self.long[unit.names[0]] = pickled


class Comparison:
    """Fills `found` from one look at the namespace. `outside`: what functions name that stand in no variable."""

    def __init__(self, known: Known, roots: Roots, found: Changes, outside: frozenset[str] = frozenset()) -> None:
        self._known, self._roots, self._found, self._outside = known, roots, found, outside

    def run(self, current: dict[str, Any]) -> set[str]:
        """Compare `current`, from which names that the log cannot hold are taken; what stands for those."""
        labels = self._unwritable(current)
        self._compare_objects(self._compare_atoms(current))
        self._compare_settings()
        return labels

    def packed(self, values: dict[str, Any]) -> Packed:
        """A component of values that are no variables."""
        self._emit(Unit(tuple(values), {}), dump(values, self._roots, arrays.Storages()), ())
        (packed,) = self._found.components
        return packed

    def _unwritable(self, current: dict[str, Any]) -> set[str]:
        """Take the names that the log cannot hold out of `current`; what stands for them among the lost."""
        labels = set()
        for name in [name for name in current if not names.writable(name)]:
            label = names.label(name)
            del current[name]
            labels.add(label)
            self._note_lost((label,), names.why_not_writable(name))
        return labels

    def _compare_atoms(self, current: Mapping[str, Any]) -> dict[str, Any]:
        fresh: dict[str, Any] = {}
        objects: dict[str, Any] = {}
        known = self._known
        for name, value in current.items():
            held = known.atoms.get(name, _ABSENT) is value and name in known.digests and name not in known.anew
            if held and not _grew(value, self._roots):
                self._found.atoms[name] = value
            elif names.is_atom(value):
                self._found.atoms[name] = fresh[name] = value
            else:
                objects[name] = value
        for group in groups.buckets(fresh, ATOMS_ALONE):
            self._emit_atoms(group, fresh)
        return objects

    def _emit_atoms(self, group: tuple[str, ...], values: Mapping[str, Any]) -> None:
        pickled = self._attempt({name: values[name] for name in group}, arrays.Storages())
        if not isinstance(pickled, str):
            self._emit(Unit(group, {}), pickled, ())
        elif len(group) == 1:
            self._note_lost(group, pickled)
        else:  # one of them cannot be pickled, and only that one is lost
            for name in group:
                self._emit_atoms((name,), values)

    def _compare_objects(self, objects: dict[str, Any]) -> None:
        """Examine what could have changed; what is found in it may name more."""
        examined = _Examined()
        within: dict[str, list[str]] = {}
        done: set[str] = set()
        storages = arrays.Storages()
        for name in self._touched(objects):
            if name in done:
                continue
            for unit in self._as_units(name, objects):
                done.update(unit.names)
                self._found.examined += 1
                larger = _part_of(unit, objects, examined.long)
                if larger:
                    within.setdefault(larger, []).append(unit.names[0])
                    continue
                pickled = self._attempt({each: objects[each] for each in unit.names}, storages)
                if isinstance(pickled, str):
                    unit = self._fall_apart(unit, objects, storages, pickled, examined)
                else:
                    examined.add(unit, pickled)
        self._emit_groups(list(examined.all.values()), within, objects, storages)

    def _fall_apart(
        self,
        unit: Unit,
        objects: Mapping[str, Any],
        storages: arrays.Storages,
        reason: str,
        examined: _Examined,
    ) -> Unit:
        """One of a unit's variables cannot be pickled: each for itself, so that only that one is lost."""
        for name in unit.names:
            alone = Unit((name,), {name: identity_of(name, objects[name])})
            pickled = self._attempt({name: objects[name]}, storages) if len(unit.names) > 1 else reason
            if isinstance(pickled, str):
                self._note_lost((name,), pickled)
                self._found.units.append(alone)
            else:
                examined.add(alone, pickled)
        return unit

    def _touched(self, objects: Mapping[str, Any]) -> list[str]:
        def reflective(word: str) -> bool:
            value = self._found.atoms.get(word, _ABSENT)
            if value is _ABSENT:
                value = objects.get(word, _ABSENT)
            known = value is not _ABSENT and (id(value) in self._roots.memo or touch.reflective_value(value))
            return bool(known)

        reached = None
        if any(identity_of(name, objects.get(name)) != self._known.latest.get(name) for name in names.LATEST):
            self._known.words.update(names.LATEST)  # IPython moved its results on
        if not (self._known.everything or self._known.from_log):
            units: Mapping[str, touch.Mentioning] = self._known.units
            reached = touch.touched(self._known.words | self._outside, units, reflective)
        if reached is None:
            return list(objects)
        return [
            name
            for name, value in objects.items()
            if name in reached
            or name in self._known.anew
            or (unit := self._known.units.get(name)) is None
            or unit.identities.get(name) != identity_of(name, value)
        ]

    def _as_units(self, name: str, objects: Mapping[str, Any]) -> list[Unit]:
        """The unit `name` stands in, as far as it still stands; its variables one by one when one was rebound."""
        unit = self._known.units.get(name)
        if unit is None:
            return [Unit((name,), {name: identity_of(name, objects[name])})]
        there = [each for each in unit.names if each in objects and self._known.units.get(each) is unit]
        identities = {each: identity_of(each, objects[each]) for each in there}
        if len(there) == len(unit.names) and identities == unit.identities:
            again = Unit(unit.names, identities, unit.digest, unit.marks, patience=unit.patience)
            if unit.exposed and unit.exposed != NOT_LOOKED_INTO and unit.skip and name not in self._known.words:
                again.exposed, again.skip = unit.exposed, unit.skip - 1
            elif unit.exposed == NOT_LOOKED_INTO and self._known.words.isdisjoint(unit.names):
                again.in_vain = unit.in_vain + 1
            return [again]
        alone = [each for each in there if identities[each] != unit.identities.get(each)]
        if not set(alone) <= set(names.LATEST):  # IPython moves those on; the results also stand in `_<n>`
            alone = there
        rest = tuple(each for each in there if each not in alone)
        kept = [Unit(rest, {each: identities[each] for each in rest}, "", unit.marks)] if rest else []
        return kept + [Unit((each,), {each: identities[each]}, "", unit.marks) for each in alone]

    def _emit_groups(
        self,
        examined: list[tuple[Unit, Pickled]],
        within: Mapping[str, list[str]],
        objects: Mapping[str, Any],
        storages: arrays.Storages,
    ) -> None:
        """`within`: variables that are part of what was examined under another's name, and were not on their own."""
        singles: dict[str, tuple[Unit, Pickled]] = {}
        kept = constants.Kept(but=objects.values())
        for group in groups.groups([pickled for _, pickled in examined], kept):
            unit, pickled = examined[group[0]]
            more = [name for number in group for name in within.get(examined[number][0].names[0], ())]
            if len(group) > 1 or more:
                for number in group:
                    examined[number][1].release()
                members = tuple(sorted([*more, *(name for number in group for name in examined[number][0].names)]))
                largest_first = sorted((examined[number][0] for number in group), key=lambda unit: -unit.size)
                marks = tuple(each for unit in largest_first for each in unit.marks)
                together = self._together(members, marks, objects, storages)
                if isinstance(together, str):
                    self._note_lost(members, together)
                else:
                    self._keep(*together)
            elif len(unit.names) > 1 or pickled.buffers or hidden.is_pseudo(unit.names[0]):
                self._keep(unit, pickled)
            else:
                singles[unit.names[0]] = unit, pickled
        for names_together in groups.buckets(singles, OBJECTS_ALONE):
            bucket = self._together(names_together, (), objects, storages) if len(names_together) > 1 else ""
            for each in [singles[name] for name in names_together] if isinstance(bucket, str) else [bucket]:
                self._keep(*each)

    def _together(
        self, members: tuple[str, ...], marks: tuple[Marks, ...], objects: Mapping[str, Any], storages: arrays.Storages
    ) -> tuple[Unit, Pickled] | str:
        pickled = self._attempt({name: objects[name] for name in members}, storages)
        if isinstance(pickled, str):
            return pickled
        return Unit(members, {name: identity_of(name, objects[name]) for name in members}, "", marks), pickled

    def _keep(self, unit: Unit, pickled: Pickled) -> None:
        self._emit(unit, pickled, unit.marks)
        self._found.units.append(unit)

    def _compare_settings(self) -> None:
        for name, value in self._found.settings.items():
            known = name in self._known.settings and name not in self._known.anew
            if not known or self._known.settings[name] != value:
                pickled = self._attempt({name: value}, arrays.Storages())
                if isinstance(pickled, str):
                    self._note_lost((name,), pickled)
                else:
                    self._emit(Unit((name,), {}), pickled, ())

    def _attempt(self, values: dict[str, Any], storages: arrays.Storages) -> Pickled | str:
        try:
            return dump(values, self._roots, storages)
        except BaseException as err:  # noqa: BLE001 - the user's __reduce__ may raise anything, SystemExit included
            return why_not(err, next(iter(values.values())))

    def _note_lost(self, group: tuple[str, ...], reason: str) -> None:
        for name in group:
            if self._known.lost.get(name) != reason:
                self._found.lost[name] = reason

    def _emit(self, unit: Unit, pickled: Pickled, before: tuple[Marks, ...]) -> None:
        parts: list[bytes | memoryview] = [pickled.stream, *pickled.buffers]
        known = buffers.known(before) if len(before) != len(parts) else {}
        frames = buffers.frames(parts, before if before and not known else [None] * len(parts), known)
        digest = hashlib.blake2b(repr(unit.names).encode(), digest_size=16)
        for frame in frames:
            digest.update(frame.marks.identity().encode())
        unit.mentions, unit.functions, unit.device = pickled.mentions, pickled.functions, pickled.device
        unit.digest, unit.marks = digest.hexdigest(), tuple(frame.marks for frame in frames)
        anew = not self._known.anew.isdisjoint(unit.names)
        same = all(self._known.digests.get(name) == unit.digest for name in unit.names)
        if anew or not same:
            self._found.components.append(Packed(unit.names, unit.digest, frames, anew, known=same))


def identity_of(name: str, value: Any) -> int:
    return 0 if hidden.is_pseudo(name) else id(value)  # a pseudo-variable's value is gathered anew each time


def _part_of(unit: Unit, objects: Mapping[str, Any], long: Mapping[str, Pickled]) -> str:
    """Under which name a long pickle was made that the only variable of `unit` is a part of, or holds nothing but parts
    of; most often none was."""
    if len(unit.names) == 1 and not hidden.is_pseudo(unit.names[0]):
        value = objects[unit.names[0]]
        for first, pickled in long.items():
            if _shared(value, pickled) or _consists_of_parts(value, pickled):
                return first
    return ""


def _shared(value: Any, pickled: Pickled) -> bool:
    return id(value) in pickled.memo and pickled.shares(id(value))


def _consists_of_parts(value: Any, pickled: Pickled) -> bool:
    """`fig, axes = plt.subplots(1, 3)`: a plain container that is small, and whose items all are parts or plain values,
    so that it can be pickled where they could, and belongs to them."""
    items = _items(value)
    return any(_shared(item, pickled) for item in items) and all(
        names.is_atom(item) or _shared(item, pickled) for item in items
    )


def _items(value: Any) -> list[Any]:
    """What a list, tuple or array of objects (for a view: the array that it is one of) holds; nothing of any other
    value, or of a large one."""
    if type(value) in (list, tuple):
        return list(value) if len(value) <= MOST_ITEMS else []
    numpy: Any = sys.modules.get("numpy")
    kind = getattr(numpy, "ndarray", None)
    if type(value) is not kind or value.dtype != object:
        return []
    owner = arrays.owner(value)
    if type(owner) is not kind or owner.base is not None or owner.dtype != object or owner.size > MOST_ITEMS:
        return []
    return list(owner.flat)


def _grew(value: Any, roots: Roots) -> bool:
    """A package of which a cell imported one more submodule is written again."""
    return type(value).__name__ == "module" and bool(roots.imported) and bool(roots.submodules(value.__name__))
