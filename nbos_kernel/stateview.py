"""`%nbos state`: every variable with its size, its component, whether it is replicated, and what the last cell wrote.

Guarantees: looking changes nothing, loads nothing and calls no code of the user's; what stands in HTML is escaped. The
figures are those of the last capture: what this cell itself has bound so far is called pending, what it has changed in
place is not seen yet.

`survey` gathers (one dict, which `%nbos state --json` gives as it is), `as_text` and `as_html` show it.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .capture import hidden
from .capture.known import Known
from .ledger import Ledger, Written
from .progress import Progress, listing, size

Row = dict[str, Any]

SHOWN = 200
"""Rows that are shown; `--json` has all."""

SMALL = 1024
"""Bytes of a component up to which it shares its row with others."""

_SHAPED = frozenset({"numpy", "torch", "pandas", "polars", "pyarrow", "scipy"})
_COUNTED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)

HIDDEN = "(settings, random states and the like)"


@dataclass(frozen=True)
class Sources:
    """What the survey looks at. `status`: the daemon's, with `replica` and `members`; `room`: what is left where;
    `more`: rows of others (values that this replica has not loaded); `replayed`: variables that a failover makes again
    by running their cells; `now`: by the clock of `progress`."""

    capture: Known
    ledger: Ledger
    namespace: Mapping[str, Any]
    variables: Callable[[], Iterable[tuple[str, Any]]]
    status: Mapping[str, Any] = field(default_factory=dict)
    room: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None
    more: Sequence[Row] = ()
    replayed: Collection[str] = ()
    now: float = 0.0


def survey(sources: Sources) -> dict[str, Any]:
    """The whole state. Rows are sorted by size, the largest first."""
    standbys = _standbys(sources.status, sources.room)
    rows = [_finished(row, sources, standbys) for row in _gathered(sources)]
    rows.sort(key=lambda row: (-row["size"], row["names"]))
    totals: Counter[str] = Counter()
    for row in rows:
        totals[row["state"]] += row["size"]
    last, changed = sources.ledger.last, sources.ledger.changed
    return {
        "entry": sources.status.get("last", -1),
        "size": sum(totals.values()),
        "variables": sum(len(row["names"]) for row in rows if not hidden.is_pseudo(row["names"][0])),
        "totals": dict(totals),
        "components": rows,
        "last": _last(last) if last is not None else None,
        "last_change": _last(changed) if changed is not None else None,
        "under_way": sources.progress.text(sources.now) if sources.progress is not None else None,
        "standbys": standbys,
        "store": dict(sources.room.get("store") or {}),
        "error": str(sources.status.get("error") or ""),
    }


# -- gathering --------------------------------------------------------------------------------------------------------


def _gathered(sources: Sources) -> list[Row]:
    """Rows of the capture, of what it has not examined itself, and of what it does not know yet."""
    rows = [*_each_component(sources.capture.report(), sources), *sources.more]
    named = {name for row in rows for name in row["names"]}
    older = [each for each in sources.ledger.others(named) if any(name in sources.capture.digests for name in each[0])]
    for names, count in older:
        known = [name for name in names if name in sources.capture.digests]
        rows.append({"names": known, "size": count, "state": "replicated", "reason": ""})
        named.update(known)
    current = dict(sources.variables())
    fresh = sorted(name for name in current if _unwritten(name, current[name], sources.capture))
    known_rows = _without(rows, set(fresh))
    if fresh:
        why = "bound by this cell: written when it ends"
        known_rows += [{"names": [name], "size": 0, "state": "pending", "reason": why} for name in fresh]
    return known_rows


def _each_component(rows: Iterable[Row], sources: Sources) -> Iterable[Row]:
    """The capture gathers all plain values in one row, although they were written in many components."""
    for row in rows:
        if row["state"] == "replicated" and set(row["names"]) <= sources.capture.atoms.keys():
            for names, count in sources.ledger.components(row["names"]):
                yield {**row, "names": names, "size": count}
        else:
            yield row


def _without(rows: Iterable[Row], gone: Collection[str]) -> list[Row]:
    left = []
    for row in rows:
        names = [name for name in row["names"] if name not in gone]
        if names:
            left.append({**row, "names": names})
    return left


def _unwritten(name: str, value: Any, capture: Known) -> bool:
    """Whether the log does not have what the name refers to now."""
    if name in capture.lost:
        return False
    if name in capture.atoms:
        return capture.atoms[name] is not value
    unit = capture.units.get(name)
    if unit is not None:
        return not hidden.is_pseudo(name) and unit.identities.get(name) != id(value)
    return name not in capture.digests


def _finished(row: Row, sources: Sources, standbys: Sequence[Row]) -> Row:
    """With types, entry, and where it is."""
    names: list[str] = sorted(row["names"])
    state, reason = row["state"], row["reason"]
    entry = max(map(sources.ledger.entry_of, names))
    has = [each["replica"] for each in standbys if each["applied"] >= max(entry, 0) and each["state"] == "ready"]
    if state == "replicated":
        reason = f"examined after every cell: {reason}" if reason else ""
        state, reason = _where(names, entry, reason, sources, standbys, has)
    elif state == "not replicated" and set(names) <= set(sources.replayed):
        state = "replayed"
    reason = "; ".join(filter(None, [reason, row.get("note", "")]))
    kinds = {name: kind_of(sources.namespace[name]) for name in names if name in sources.namespace}
    found = {"names": names, "types": kinds, "size": row["size"], "state": state, "reason": reason}
    return {**found, "entry": entry, "standbys": has}


def _where(
    names: Sequence[str],
    entry: int,
    reason: str,
    sources: Sources,
    standbys: Sequence[Row],
    has: Collection[int],
) -> tuple[str, str]:
    progress = sources.progress
    if progress is not None and not set(names).isdisjoint(progress.names):
        return "pending", progress.text(sources.now)
    missing = [each for each in standbys if each["replica"] not in has and each["applied"] < entry]
    if missing:
        late = ", ".join(f"replica {each['replica']} (told of {each['applied']})" for each in missing)
        return "pending", f"in the log as entry {entry}; not heard of it yet from {late}"
    return "replicated", reason


def kind_of(value: Any) -> str:
    """Its type, with shape or length where that is known without running anybody's code."""
    kind = type(value)
    name = kind.__qualname__[:60]
    if kind in _COUNTED:
        return f"{name}, {len(value):,}"
    if str(kind.__module__).partition(".")[0] in _SHAPED:
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if isinstance(shape, tuple):
            text = "×".join(str(number) for number in shape)
            return f"{name} {text}" + (f" {str(dtype).removeprefix('torch.')}" if dtype is not None else "")
    return name


def _standbys(status: Mapping[str, Any], room: Mapping[str, Any]) -> list[Row]:
    free = {each.get("replica"): each.get("free") for each in room.get("standbys") or ()}
    return [
        {
            "replica": member["index"],
            "host": member.get("host", ""),
            "state": member.get("state", ""),
            "applied": member.get("applied", -1),
            "behind": max(0, status.get("last", -1) - member.get("applied", -1)),
            "memory_left": free.get(member["index"]),
        }
        for member in status.get("members") or ()
        if member["index"] != status.get("replica")
    ]


def _last(last: Written) -> Row:
    components = [{"names": list(names), "fresh": fresh} for names, fresh in sorted(last.components, key=_by_fresh)]
    seconds = {"captured": last.captured, "safe": last.safe, "standbys": dict(last.standbys)}
    return {
        "entry": last.n,
        "fresh": last.fresh,
        "total": last.total,
        "chunks": last.chunks,
        "components": components,
        "seconds": seconds,
    }


def _by_fresh(component: tuple[Sequence[str], int]) -> int:
    return -component[1]


# -- showing ----------------------------------------------------------------------------------------------------------


def _shown(state: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(size, state, names, types, reason) of each row; hidden state is one row."""
    rows = []
    unseen: Counter[str] = Counter()
    for row in _few(state["components"])[:SHOWN]:
        if all(hidden.is_pseudo(name) for name in row["names"]) and row["state"] != "not replicated":
            unseen[row["state"]] += row["size"]
            continue
        kinds = Counter(row["types"].values())
        types = "; ".join(kind if count == 1 else f"{count} × {kind}" for kind, count in kinds.most_common(3))
        types += "; …" if len(kinds) > 3 else ""
        rows.append(
            (size(row["size"]) if row["size"] else "", row["state"], listing(row["names"], 6), types, row["reason"])
        )
    return [*rows, *((size(count), where, HIDDEN, "", "") for where, count in unseen.items())]


def _few(components: Iterable[Row]) -> list[Row]:
    """Small components of which the same is to be said are one row."""
    rows: list[Row] = []
    small: dict[tuple[str, str], Row] = {}
    for row in components:
        key = (row["state"], row["reason"])
        if row["size"] >= SMALL or row["state"] == "not replicated" or all(map(hidden.is_pseudo, row["names"])):
            rows.append(row)
        elif key not in small:
            small[key] = {**row}
            rows.append(small[key])
        else:
            one = small[key]
            one["size"], one["names"] = one["size"] + row["size"], [*one["names"], *row["names"]]
            one["types"] = {**one["types"], **row["types"]}
    return rows


def _headline(state: Mapping[str, Any]) -> str:
    parts = [f"{size(count)} {name}" for name, count in sorted(state["totals"].items()) if count]
    text = f"{size(state['size'])} in {state['variables']} variables, {len(state['components'])} components"
    return f"{text} (as of the last cell, entry {state['entry']}): " + (", ".join(parts) or "nothing large")


def _notes(state: Mapping[str, Any]) -> list[str]:
    """What the last cell wrote, the standbys, the store."""
    notes = [f"now: {state['under_way']}"] if state["under_way"] else []
    notes += _about_last(state["last"], state["last_change"])
    for each in state["standbys"]:
        late = f", {each['behind']} entries behind" if each["behind"] else ", has everything"
        memory = f", {size(each['memory_left'])} of memory left" if each["memory_left"] is not None else ""
        text = late if each["applied"] >= 0 else ", has nothing yet"
        notes.append(f"standby: replica {each['replica']} on {each['host']} is {each['state']}{text}{memory}")
    if not state["standbys"] and not state["error"]:
        notes.append("no standby: the state is in the log and the store only")
    free = state["store"].get("free")
    if free is not None:
        notes.append(f"{state['store'].get('where') or 'the blob store'}: {size(free)} left")
    hidden_rows = len(_few(state["components"])) - SHOWN
    if hidden_rows > 0:
        notes.append(f"{hidden_rows} smaller components are not shown; `%nbos state --json` has all")
    return [*notes, state["error"]] if state["error"] else notes


def _about_last(last: Mapping[str, Any] | None, changed: Mapping[str, Any] | None) -> list[str]:
    if last is None:
        return ["this replica has run no cell yet"]
    if changed is None or changed["entry"] == last["entry"]:
        return _about(last, "the last cell")
    return [*_about(last, "the last cell"), *_about(changed, "the last that did")]


def _about(last: Mapping[str, Any], which: str) -> list[str]:
    told = [each for each in last["components"] if not all(map(hidden.is_pseudo, each["names"]))]
    if not told:
        return [f"{which} (entry {last['entry']}) wrote no variable"]
    most = "; ".join(f"{listing(each['names'], 6)} {size(each['fresh'])}" for each in told[:5])
    chunks = f" in {last['chunks']} chunks" if last["chunks"] else ""
    text = f"{which} (entry {last['entry']}) wrote {size(last['fresh'])} of {size(last['total'])}{chunks}: {most}"
    seconds = last["seconds"]
    times = [f"captured {seconds['captured']:.2f} s"] if seconds["captured"] is not None else []
    times += [f"safe {seconds['safe']:.2f} s"] if seconds["safe"] is not None else ["not safe yet"]
    times += [f"on replica {index} at most {after:.2f} s" for index, after in sorted(seconds["standbys"].items())]
    return [text + ("; …" if len(told) > 5 else ""), "after its end: " + ", ".join(times)]


def as_text(state: Mapping[str, Any]) -> str:
    rows = _shown(state)
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    lines = [_headline(state)]
    for count, where, names, types, reason in rows:
        line = f"  {count:>{widths[0]}}  {where:<{widths[1]}}  {names}"
        lines.append(line + (f"  [{types}]" if types else "") + (f"  ({reason})" if reason else ""))
    return "\n".join([*lines, *_notes(state)])


def as_html(state: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("Size", "State", "Variables", "Type", ""))
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in _shown(state)
    )
    notes = "<br>".join(html.escape(note) for note in _notes(state))
    return f"<div>{html.escape(_headline(state))}</div><table><tr>{head}</tr>{body}</table><div>{notes}</div>"
