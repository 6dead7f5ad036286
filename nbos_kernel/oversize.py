"""What one execution changed, cut to what one log entry can carry, with nothing dropped unnamed.

Guarantees: the entry fits whatever a cell does (about half a million variables, or 10 TB in chunks; what is too much
for etcd goes into a table, see docs/state-store.md); a variable that finds no room is lost with its reason and is tried
again by the next execution; where too many names are lost for the entry to list them, it lists the first, says how
many more there are, and carries all of them as a value (`LIST`), so that every replica knows each name.

COMPONENT_BYTES, DELETED_BYTES and entries.INLINE_BUDGET add up to less than wire.MAX_PAYLOAD; the others, which stay in
etcd, to less than wire.ENTRY_LIMIT. Values themselves count nothing, because they can be blobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .capture import hidden
from .capture.changes import Capture, Changes, Packed

LIST = "%lost"
"""The component that holds {name: reason} of everything that is lost."""

MORE = "(more variables)"
"""Stands among the lost names for those that are only in LIST."""

COMPONENT_BYTES = 40 * 1024 * 1024
DELETED_BYTES = 8 * 1024 * 1024
LOST_BYTES = 48 * 1024
SOURCE_CHARACTERS = 24 * 1024
SHOWN = 20
"""Lost names that a cell's output names one by one."""

NO_ROOM = "one cell changed more variables than a log entry can name; the next cells try again"


def fit(found: Changes, lost: Mapping[str, str]) -> list[str]:
    """Cut `found` to the budgets; what the user must know of it. Before `Capture.accept`; `lost`: until now."""
    kept: list[Packed] = []
    dropped: list[Packed] = []
    room = COMPONENT_BYTES
    for component in sorted(
        found.components, key=lambda each: not hidden.is_pseudo(each.names[0])
    ):  # the small ones first
        room -= _cost(component)
        (kept if room >= 0 else dropped).append(component)
    if dropped:
        found.components = kept
        names = [name for component in dropped for name in component.names]
        found.lost.update({name: NO_ROOM for name in names if lost.get(name) != NO_ROOM})
        found.again.update(names)
    fitting = len(list(_within(found.deleted, DELETED_BYTES)))
    later, found.deleted = len(found.deleted) - fitting, found.deleted[:fitting]
    return [f"NBOS: {later} deleted variables leave the other replicas only with the next cells"] if later else []


def give_up(found: Changes) -> None:
    """The daemon refused the entry even so: only names are left of it, as lost ones."""
    names = [name for component in found.components for name in component.names if name != LIST]
    found.lost.update(dict.fromkeys(names, NO_ROOM))
    found.components = []


def source(text: str) -> str:
    """A cell's text as the history of the other replicas keeps it."""
    if len(text) <= SOURCE_CHARACTERS:
        return text
    note = f"\n# NBOS kept {SOURCE_CHARACTERS} of this cell's {len(text)} characters here"
    return text[:SOURCE_CHARACTERS] + note


def listed(found: Changes, capture: Capture, before: Mapping[str, str]) -> Changes:
    """`found` (accepted already) with its lost names in a form that fits. `before`: what was lost until now."""
    every = {name: reason for name, reason in capture.lost.items() if name != MORE}
    short = summary(every)
    if MORE not in short:
        if MORE not in before:
            return found
        capture.forget([MORE])
        return Changes(found.components, [*found.deleted, LIST, MORE], every, found.atoms)
    if MORE in before and every == {name: reason for name, reason in before.items() if name != MORE}:
        return found
    capture.note({MORE: short[MORE]})
    return Changes([*found.components, capture.packed({LIST: every})], found.deleted, short, found.atoms)


def summary(lost: Mapping[str, str]) -> dict[str, str]:
    """The first names that fit, and how many more there are."""
    names = list(_within(lost, LOST_BYTES, lost))
    short = {name: lost[name] for name in names}
    rest = len(lost) - len(names)
    if rest:
        short[MORE] = f"{rest} more; `%nbos status` names them"
    return short


def told(lost: Mapping[str, str]) -> list[str]:
    """The lines of the cell's output about what is newly lost."""
    lines = [
        f"NBOS: {name!r} is not replicated and would be gone after a failover: {reason}"
        for name, reason in list(lost.items())[:SHOWN]
    ]
    if len(lost) > SHOWN:
        lines.append(f"NBOS: and {len(lost) - SHOWN} more variables; `%nbos status` names them")
    return lines


def unlisted(values: dict[str, Any], digests: dict[str, str]) -> dict[str, str]:
    """Take LIST out of what a replica loaded: the lost names of which nothing later was written."""
    digests.pop(LIST, None)
    return {name: reason for name, reason in (values.pop(LIST, None) or {}).items() if name not in digests}


def _cost(component: Packed) -> int:
    names = sum(len(name.encode("utf-8", "replace")) + 3 for name in component.names)
    return names + 45 + sum(20 + 83 * len(frame.hashes) for frame in component.frames)


def _within(names: Iterable[str], room: int, texts: Mapping[str, str] | None = None) -> Iterable[str]:
    for name in names:
        room -= len(name.encode("utf-8", "replace")) + 3
        room -= len(texts[name].encode("utf-8", "replace")) + 3 if texts is not None else 0
        if room < 0:
            return
        yield name
