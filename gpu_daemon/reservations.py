"""Room kept for a course: "20 TPCs each for 30 students, Tuesdays 10 to 12". As configured, and when it holds. No IO.

One list, `GPUDaemon.reservations`. During its hours a member's cell that stays within a seat is guaranteed, and what
nobody sits on yet is kept. Before them, others may use the room for cells that are expected to end in time, by what
their kernel took before: nobody's cell is ever broken off for a course. (Asking cells to end would need their owners'
consent to lose work; a course that must not wait for an overrunning cell begins its reservation earlier.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from gpu_daemon.ledger import share_of
from gpu_daemon.sizes import parse_bytes
from nbos_cluster.records import Device, Resources

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
FIELDS = (
    *("name", "users", "groups", "seats", "tpcs", "gpus", "memory"),
    *("days", "from", "to", "timezone", "first", "last"),
)
Window = tuple[float, float]
"""Begin and end, Unix seconds."""


class ReservationError(ValueError):
    """The reservation cannot be used; names it, the field, the limit and the way out."""


@dataclass(frozen=True)
class Reservation:
    """seats: how many members are served at a time on this host; seat: what each gets. first, last: days (inclusive)
    between which it recurs, None: no bound."""

    name: str
    users: frozenset[str]
    groups: frozenset[str]
    seats: int
    seat: Resources
    days: frozenset[int]
    begin: time
    end: time
    zone: tzinfo
    first: date | None = None
    last: date | None = None

    def member(self, owner: str, groups: Iterable[str]) -> bool:
        return owner in self.users or not self.groups.isdisjoint(groups)

    def window(self, now: float) -> Window | None:
        """The hours that hold now, or the next ones; None when there are none any more."""
        day = datetime.fromtimestamp(now, self.zone).date()
        if self.first is not None and self.first > day:
            day = self.first
        for _ in range(8):
            if self.last is not None and day > self.last:
                return None
            # Made from the local wall clock each time: a course at ten stays at ten when clocks are changed.
            end = datetime.combine(day, self.end, self.zone).timestamp()
            if day.weekday() in self.days and end > now:
                return datetime.combine(day, self.begin, self.zone).timestamp(), end
            day += timedelta(days=1)
        return None

    @property
    def text(self) -> str:
        """For people: `ml101 (Tuesday 10:00 to 12:00 Europe/Berlin)`."""
        days = ", ".join(DAYS[d].capitalize() for d in sorted(self.days))
        return f"{self.name} ({days} {self.begin:%H:%M} to {self.end:%H:%M} {self.zone})"

    def check(self, host: str, devices: Iterable[Device]) -> None:
        """Raise ReservationError when the host has no room for so many seats."""
        room = sum(_seats_on(device, self.seat) for device in devices)
        if self.seat.gpus:
            room //= self.seat.gpus
        if self.seats > room:
            what = f"{self.seat.gpus} GPUs" if self.seat.gpus else f"{self.seat.tpcs} TPCs"
            raise ReservationError(
                f"reservation {self.name}: host {host} has room for {room} seats of {what}, not {self.seats}; "
                f"reserve at most {room} here, and the rest in the configuration of other hosts"
            )


def _seats_on(device: Device, seat: Resources) -> int:
    if seat.gpus:
        return int(device.memory >= seat.memory)
    memory = share_of(device, seat)
    return min(device.tpcs // seat.tpcs, device.memory // memory if memory else device.tpcs)


class Calendar:
    """Which reservations hold when; each one's window is looked up once and kept until it is over."""

    def __init__(self, reservations: Sequence[Reservation] = ()) -> None:
        self.reservations = tuple(reservations)
        self._windows: dict[str, Window | None] = {}

    def __bool__(self) -> bool:
        return bool(self.reservations)

    def window(self, reservation: Reservation, now: float) -> Window | None:
        name = reservation.name
        known = self._windows.get(name)
        if name not in self._windows or (known is not None and known[1] <= now):
            known = self._windows[name] = reservation.window(now)
        return known

    def between(self, now: float, until: float) -> tuple[Reservation, ...]:
        """Those whose hours touch the time from `now` to `until`."""
        found = []
        for reservation in self.reservations:
            window = self.window(reservation, now)
            if window is not None and window[0] <= until and now < window[1]:
                found.append(reservation)
        return tuple(found)

    def forget(self) -> None:
        """The clock was set: look again."""
        self._windows.clear()


# -- reading -----------------------------------------------------------------------------------------------------------


def read_reservations(config: Sequence[Any]) -> tuple[Reservation, ...]:
    """The reservations of a configuration. Raises ReservationError that names the wrong one and its field."""
    found = tuple(_reservation(number, raw) for number, raw in enumerate(config, 1))
    names = [r.name for r in found]
    for name in names:
        if names.count(name) > 1:
            raise ReservationError(f"reservation {name}: the name stands twice; give each one its own")
    return found


def _reservation(number: int, raw: Any) -> Reservation:
    if not isinstance(raw, Mapping):
        raise ReservationError(f"reservation {number} must be a dict with some of {', '.join(FIELDS)}, not {raw!r}")
    name = raw.get("name")
    if not isinstance(name, str) or not name:
        raise ReservationError(f"reservation {number}: name is missing; give it one that people understand")
    where = f"reservation {name}"
    unknown = set(raw) - set(FIELDS)
    if unknown:
        raise ReservationError(f"{where}: {sorted(unknown)[0]!r} is unknown; there are {', '.join(FIELDS)}")
    users, groups = _names(where, raw, "users"), _names(where, raw, "groups")
    if not users and not groups:
        raise ReservationError(f"{where}: it is for nobody; name users or groups")
    begin, end = _time(where, raw, "from"), _time(where, raw, "to")
    if end <= begin:
        raise ReservationError(
            f"{where}: it ends at {end:%H:%M}, before it begins at {begin:%H:%M}; write one over midnight as two"
        )
    first, last = _date(where, raw, "first"), _date(where, raw, "last")
    if first and last and last < first:
        raise ReservationError(f"{where}: its last day {last} is before its first day {first}")
    return Reservation(
        name=name,
        users=users,
        groups=groups,
        seats=_count(where, raw, "seats", 1, 10_000),
        seat=_seat(where, raw),
        days=_days(where, raw),
        begin=begin,
        end=end,
        zone=_zone(where, raw),
        first=first,
        last=last,
    )


def _names(where: str, raw: Mapping[str, Any], key: str) -> frozenset[str]:
    value = raw.get(key, [])
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) and one for one in value):
        raise ReservationError(f"{where}: {key} must be a list of names, not {value!r}")
    return frozenset(value)


def _count(where: str, raw: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = raw.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ReservationError(f"{where}: {key} must be a whole number from {low} to {high}, not {value!r}")
    return value


def _seat(where: str, raw: Mapping[str, Any]) -> Resources:
    gpus, tpcs = _count(where, raw, "gpus", 0, 64), _count(where, raw, "tpcs", 0, 100_000)
    if bool(gpus) == bool(tpcs):
        raise ReservationError(f"{where}: a seat is either so many tpcs or so many gpus; name one of the two")
    memory = raw.get("memory", 0)
    try:
        size = parse_bytes(memory) if isinstance(memory, str) else memory
    except ValueError as err:
        raise ReservationError(f"{where}: memory: {err}") from err
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ReservationError(f"{where}: memory must be a size such as '10G', not {memory!r}")
    return Resources(gpus=gpus, tpcs=tpcs, memory=size)


def _days(where: str, raw: Mapping[str, Any]) -> frozenset[int]:
    value = raw.get("days", [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ReservationError(f"{where}: days must be a list of weekdays such as ['tuesday'], not {value!r}")
    short = {name[:3]: number for number, name in enumerate(DAYS)}
    found = set()
    for name in names:
        day = str(name).lower()
        number = short.get(day[:3])
        if number is None or day not in (DAYS[number], DAYS[number][:3]):
            raise ReservationError(f"{where}: {name!r} is no weekday; write {', '.join(DAYS)}")
        found.add(number)
    return frozenset(found)


def _time(where: str, raw: Mapping[str, Any], key: str) -> time:
    value = raw.get(key)
    try:
        return datetime.strptime(value if isinstance(value, str) else "", "%H:%M").time()
    except ValueError as err:
        raise ReservationError(f"{where}: {key} must be a time of day such as '10:00', not {value!r}") from err


def _date(where: str, raw: Mapping[str, Any], key: str) -> date | None:
    value = raw.get(key)
    try:
        return date.fromisoformat(value) if value is not None else None
    except (TypeError, ValueError) as err:
        raise ReservationError(f"{where}: {key} must be a day such as '2026-10-13', not {value!r}") from err


def _zone(where: str, raw: Mapping[str, Any]) -> tzinfo:
    value = raw.get("timezone")
    if not isinstance(value, str) or not value:
        raise ReservationError(f"{where}: timezone is missing; write for example 'Europe/Berlin' or 'UTC'")
    if value == "UTC":  # works where no time zones are installed
        return UTC
    try:
        return ZoneInfo(value)
    except (OSError, ValueError, KeyError) as err:
        raise ReservationError(
            f"{where}: this host knows no time zone {value!r}; write for example 'Europe/Berlin' or 'UTC' (where none "
            "is known, the system package tzdata is missing)"
        ) from err
