"""What was used, out of the daemons' records: read hour by hour, summed by user, group or kernel, as JSON or CSV.

It must guarantee: a user sees what is their own, an administrator everything; sums are true: a user in several groups
is one row with all their names, so that rows add up to the whole whatever they are summed by.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.kv import Op, Txn, prefix_end
from nbos_cluster.records import HourRecord, UseLine

from .auth import Caller
from .errors import ApiError

HOUR = 3600
LONGEST = 3660 * 24
"""Hours that one question may span."""
AT_ONCE = 7 * 24
"""Hours of one host that are read from etcd at once."""

By = Literal["user", "group", "kernel"]
AMOUNTS = ("cells", "seconds", "device_seconds", "tpc_seconds", "memory_byte_seconds", "joules")


@dataclass(frozen=True)
class Wanted:
    """since, until: Unix hours; until is not included."""

    since: int
    until: int
    by: By
    form: Literal["json", "csv"]


def read_wanted(query: dict[str, str], now: float | None = None) -> Wanted:
    """The question in a request's query. Raises ApiError 400 that names the parameter."""
    this = int((time.time() if now is None else now) // HOUR)
    until = _hour("until", query["until"]) if query.get("until") else this + 1
    since = _hour("since", query["since"]) if query.get("since") else until - 30 * 24
    if since >= until:
        raise ApiError(400, "malformed", "since must be before until")
    if until - since > LONGEST:
        raise ApiError(400, "malformed", f"since and until may be {LONGEST // 24} days apart at most")
    by, form = query.get("by") or "user", query.get("format") or "json"
    if by not in ("user", "group", "kernel"):
        raise ApiError(400, "malformed", f"by={by[:40]!r} is unknown; use user, group or kernel")
    if form not in ("json", "csv"):
        raise ApiError(400, "malformed", f"format={form[:40]!r} is unknown; use json or csv")
    return Wanted(since, until, cast(By, by), cast(Literal["json", "csv"], form))


def _hour(name: str, text: str) -> int:
    try:
        when = datetime.fromisoformat(text)
        seconds = (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as err:
        raise ApiError(
            400, "malformed", f"{name}={text[:40]!r} must be a day or an hour such as 2026-11-17 or 2026-11-17T10:00Z"
        ) from err
    if seconds % HOUR or not 0 <= seconds < 1e11:
        raise ApiError(
            400, "malformed", f"{name}={text[:40]!r} must be a whole hour since 1970: accounts are kept by hours"
        )
    return int(seconds // HOUR)


def show_hour(hour: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(hours=hour)).isoformat()


async def read_lines(etcd: Etcd, since: int, until: int) -> list[UseLine]:
    """What all hosts, also those that are gone, recorded of these hours. Raises EtcdUnavailable, EtcdError."""
    found: list[UseLine] = []
    async for host in _hosts(etcd):
        for first in range(since, until, AT_ONCE):
            begin = keys.account_hour(host, first)
            end = keys.account_hour(host, min(first + AT_ONCE, until))
            answer = await etcd.commit(Txn([], [Op("get", begin, end)]))
            for kv in answer.responses[0]:
                found += records.decode(kv.value, HourRecord).lines
    return found


async def _hosts(etcd: Etcd) -> Any:
    """From the last to the first, each found by what stands before the one found last."""
    end = prefix_end(keys.ACCOUNTS)
    while True:
        answer = await etcd.commit(Txn([], [Op("get", keys.ACCOUNTS, end, keys_only=True, newest=True)]))
        newest = answer.responses[0]
        if not newest:
            return
        host = newest[0].key.removeprefix(keys.ACCOUNTS).partition("/")[0]
        yield host
        end = keys.accounts(host)


def visible(lines: Iterable[UseLine], caller: Caller) -> Iterator[UseLine]:
    return (one for one in lines if caller.admin or (caller.kind == "user" and one.owner == caller.name))


def rows(lines: Iterable[UseLine], by: By) -> list[dict[str, Any]]:
    """One for each user, set of groups, or kernel (with its user), by name."""
    sums: dict[tuple[str, ...], list[float]] = {}
    for line in lines:
        amounts = (line.cells, line.seconds, line.device_seconds, line.tpc_seconds, line.byte_seconds, line.joules)
        total = sums.setdefault(_names(line, by), [0] * len(amounts))
        for at, amount in enumerate(amounts):
            total[at] += amount
    columns = columns_of(by)
    return [dict(zip(columns, (*names, *total), strict=True)) for names, total in sorted(sums.items())]


def columns_of(by: By) -> tuple[str, ...]:
    return ("kernel", "user", *AMOUNTS) if by == "kernel" else (by, *AMOUNTS)


def _names(line: UseLine, by: By) -> tuple[str, ...]:
    if by == "kernel":
        return line.kernel, line.owner
    return (line.owner,) if by == "user" else ("+".join(line.groups),)


def as_csv(table: Iterable[dict[str, Any]], by: By) -> str:
    """With a head; seconds to the thousandth."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns_of(by), lineterminator="\n")
    writer.writeheader()
    for row in table:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.3f}"
    # A spreadsheet takes a text that begins so for a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
