"""The cells that the user marked with `%%replay`: which variables each of them made, in the order they ran.

Guarantees: only a cell whose line says so is recorded, and only when it succeeded; a record counts for a variable until
anything else binds or deletes it; the records are replicated like a variable called NAME, and end with a restart.
What a failover does with them is in `rerun.py`.

Whether something else bound a variable is seen by its identity. An identity alone may belong to a new object at an old
place: where no weak reference proves the object, a cell whose text assigns the name counts as having bound it.
"""

from __future__ import annotations

import json
import re
import symtable
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .capture import names

NAME = "%replay"
"""Stands for the records among the variables of an entry."""

MOST_CELLS = 32
MOST_NAMES = 200
MOST_CHARACTERS = 48 * 1024
"""Of all records together, in the form they travel in: a short text, which is compared by identity."""

_LINE = re.compile(r"^[ \t]*%%replay[ \t]*\r?$")
_OTHER = re.compile(r"^[ \t]*%%(gpu|cpu)\b")

Values = Callable[[], Iterable[tuple[str, Any]]]


def line_of(lines: list[str]) -> int | None:
    """Where the `%%replay` line stands: the first one, or below `%%gpu` or `%%cpu`."""
    text = [number for number, line in enumerate(lines) if line.strip()][:2]
    if len(text) > 1 and _OTHER.match(lines[text[0]]):
        text = text[1:]
    return text[0] if text and _LINE.match(lines[text[0]].rstrip("\n")) else None


def marked(code: str) -> bool:
    return "%%replay" in code and line_of(code.splitlines()) is not None


@dataclass(frozen=True)
class Record:
    """A marked cell that ran: its source, the variables that are still as it made them, the GPUs it asked for."""

    source: str
    names: tuple[str, ...]
    resources: Mapping[str, Any]
    count: int


def _identity(values: Mapping[str, Any], name: str) -> int | None:
    return id(values[name]) if name in values else None


@dataclass(frozen=True)
class Ended:
    """What the user must know of the records after a cell; the variables for which there is one now, or no more."""

    told: list[str] = field(default_factory=list)
    changed: frozenset[str] = frozenset()


class _Seen:
    """What a variable referred to when a cell began."""

    def __init__(self, value: Any) -> None:
        self._identity = id(value)
        try:
            self._reference: Any = weakref.ref(value)
        except TypeError:
            self._reference = None

    def still(self, value: Any, assigned: bool) -> bool:
        if self._reference is not None:
            return self._reference() is value
        return id(value) == self._identity and not assigned


class Records:
    """`variables()` gives the user's (name, value) pairs at this moment, `transform` makes Python of a cell."""

    def __init__(self, variables: Values, transform: Callable[[str], str]) -> None:
        self._variables, self._transform = variables, transform
        self.records: tuple[Record, ...] = ()
        self.within_unmarked = False
        """Whether a cell runs that is not marked: a `%%replay` line met now stands in the body of another magic."""
        self._text = ""  # one object for as long as nothing changes
        self._identities: dict[str, int | None] | None = None  # of the recorded names, after the last execution
        self._before: dict[str, int] | None = None  # of every variable, when a marked cell began
        self._seen: dict[str, _Seen] | None = None  # values of the recorded names, while a cell runs
        self._moved: set[str] = set()  # bound by something between the cells

    @property
    def covered(self) -> frozenset[str]:
        """The variables that a failover makes again."""
        return frozenset(name for record in self.records for name in record.names)

    def variable(self) -> Iterable[tuple[str, Any]]:
        if self.records:
            yield NAME, self._text

    def adopt(self, text: str | None, gone: Iterable[str], whole: bool) -> None:
        """An entry of another executor was applied. `text`: what it says of NAME; `whole`: it replaced everything."""
        if text is not None:
            self.records, self._text = _decoded(text), text
        elif whole or NAME in gone:
            self.records, self._text = (), ""
        self._identities = None

    def why_not(self, body: str) -> str:
        """Why a cell with this body below its `%%replay` line cannot be marked; empty when it can."""
        if self.within_unmarked:
            return "%%replay must be the first line of the cell"
        others = [record for record in self.records if body_of(record.source) != body]
        if len(others) >= MOST_CELLS:
            return f"a kernel keeps at most {MOST_CELLS} %%replay cells; {_way_out(others)}"
        size = len(json.dumps(body)) + len(_encoded(others))
        if size > MOST_CHARACTERS:
            text = f"with this cell the kernel's %%replay cells come to {size} characters, it keeps {MOST_CHARACTERS}"
            return f"{text}; make it shorter, or {_way_out(others)}"
        return ""

    # Around a cell -----------------------------------------------------------------------------------------------

    def begin(self, code: str) -> None:
        """A cell is about to run."""
        marks = marked(code)
        self.within_unmarked = not marks
        if not (self.records or marks):
            return
        values = dict(self._variables())
        self._between(values)
        self._seen = {name: _Seen(values[name]) for name in self.covered if name in values}
        if marks:
            self._before = {name: id(value) for name, value in values.items()}

    def ended(self, code: str, succeeded: bool, resources: Mapping[str, Any], count: int) -> Ended:
        """It ran, or (`code` empty) something between the cells did."""
        self.within_unmarked = False
        marks = succeeded and marked(code)
        if not (self.records or marks):
            self._before = None
            return Ended()
        values = dict(self._variables())
        assigned = _assigned(self._transform, code)
        if self._seen is None:
            self._between(values)
        bound = self._moved | self._bound_by_cell(values, assigned)
        told: list[str] = []
        before = self.covered
        kept = _without(self.records, bound)
        if marks:
            kept, told = self._with(kept, code, self._made(values, assigned), resources, count)
        self._become(kept)
        self._identities = {name: _identity(values, name) for name in self.covered}
        self._before, self._seen, self._moved = None, None, set()
        return Ended(told, before ^ self.covered)

    def renewed(self) -> None:
        """A replay gave variables new values: these are what the records count for."""
        values = dict(self._variables())
        self._identities = {name: _identity(values, name) for name in self.covered}

    def _between(self, values: Mapping[str, Any]) -> None:
        """Note what threads and callbacks bound since the last execution."""
        known, self._identities = self._identities, None
        if known is not None:
            self._moved |= {name for name in self.covered if _identity(values, name) != known.get(name)}

    def _bound_by_cell(self, values: Mapping[str, Any], assigned: set[str]) -> set[str]:
        if self._seen is None:
            return set()
        seen = self._seen
        bound = {name for name in self.covered - seen.keys() if name in values}  # it was lost here until now
        for name in seen:
            if name not in values or not seen[name].still(values[name], name in assigned):
                bound.add(name)
        return bound

    def _made(self, values: Mapping[str, Any], assigned: set[str]) -> tuple[str, ...]:
        before = self._before or {}
        made = [name for name, value in values.items() if name in assigned or before.get(name) != id(value)]
        return tuple(sorted(name for name in made if names.writable(name) and not _is_result(name)))

    def _with(
        self, kept: list[Record], code: str, made: tuple[str, ...], resources: Mapping[str, Any], count: int
    ) -> tuple[list[Record], list[str]]:
        """`kept` and this cell, at its place in the order."""
        again = {name for record in kept if record.source == code for name in record.names}
        record = Record(code, tuple(sorted(again | set(made))), _gpus(resources), count)
        if not record.names:
            return kept, ["NBOS: this %%replay cell made no variable; there is nothing to make again after a failover"]
        rest = [each for each in _without(kept, set(made)) if each.source != code]
        size = len(_encoded([*rest, record]))
        if len(record.names) > MOST_NAMES or size > MOST_CHARACTERS:
            much = f"made {len(record.names)} variables, NBOS keeps at most {MOST_NAMES} of a %%replay cell"
            if size > MOST_CHARACTERS:
                much = f"and the marked ones before it come to {size} characters, NBOS keeps {MOST_CHARACTERS}"
            return rest, [f"NBOS: this cell {much}; it will not run again after a failover. Split it or shorten it"]
        return [*rest, record], []

    def _become(self, records: list[Record]) -> None:
        if tuple(records) != self.records:
            self.records = tuple(records)
            self._text = _encoded(records) if records else ""


def body_of(source: str) -> str:
    """What stands below the `%%replay` line."""
    lines = source.splitlines(keepends=True)
    number = line_of(lines)
    return source if number is None else "".join(lines[number + 1 :])


def _is_result(name: str) -> bool:
    """IPython's `_` and `_7` belong to the history: a replay shows nothing and has no result."""
    return name in names.LATEST or names.result_number(name) is not None


def _way_out(records: list[Record]) -> str:
    newest = records[-1].names if records else ()
    return f"delete variables of cells that need it no more (the newest makes {', '.join(newest)[:80]})"


def _without(records: Iterable[Record], bound: set[str]) -> list[Record]:
    kept = []
    for record in records:
        left = tuple(name for name in record.names if name not in bound)
        if left:
            kept.append(record if left == record.names else Record(record.source, left, record.resources, record.count))
    return kept


def _gpus(resources: Mapping[str, Any]) -> dict[str, Any]:
    return dict(resources) if resources.get("gpus") or resources.get("tpcs") else {}


def _assigned(transform: Callable[[str], str], code: str) -> set[str]:
    """The names that the text of a cell binds in the namespace, whether its lines run or not."""
    if not code:
        return set()
    try:
        table = symtable.symtable(transform(code), "<cell>", "exec")
    except Exception:  # noqa: BLE001 - transformers of the user raise anything; code that never parsed binds nothing
        return set()
    found = {each.get_name() for each in table.get_symbols() if each.is_assigned() or each.is_imported()}
    waiting = table.get_children()
    while waiting:
        inner = waiting.pop()
        waiting += inner.get_children()
        found |= {each.get_name() for each in inner.get_symbols() if each.is_global() and each.is_assigned()}
    return found


def _encoded(records: Iterable[Record]) -> str:
    rows = [[record.source, record.names, record.resources, record.count] for record in records]
    return json.dumps(rows)


def _decoded(text: str) -> tuple[Record, ...]:
    return tuple(Record(source, tuple(made), asked, count) for source, made, asked, count in json.loads(text))
