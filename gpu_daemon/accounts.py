"""What was used, by whom: grants are followed while they are open, and their use is dealt out hour by hour. No IO.

Guarantees: every second between `begin` and `end` of a grant is accounted once, to the hour it lies in; so the lines
add up to the seconds that the ledger handed out, whatever they are summed by. Times are Unix seconds of the caller's
clock, which may be set meanwhile (`clock_set`): that makes nobody's use longer or shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nbos_cluster.records import Device, GrantRecord, UseLine

HOUR = 3600
Key = tuple[int, str, tuple[str, ...], str]
"""Hour (Unix hours), owner, groups, kernel."""


@dataclass
class Amounts:
    """seconds: of grants. device_seconds: half a device's TPCs for a second are 0.5. byte_seconds: of device memory."""

    cells: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    tpc_seconds: float = 0.0
    byte_seconds: float = 0.0
    joules: float = 0.0


@dataclass
class _Open:
    """rates: what one second costs. at: accounted until then."""

    record: GrantRecord
    at: float
    devices: float
    tpcs: int
    memory: int


class Accounts:
    """The open grants of one host."""

    def __init__(self, devices: Iterable[Device]) -> None:
        self._tpcs = {device.uuid: device.tpcs for device in devices}
        self._open: dict[str, _Open] = {}
        self._granted: dict[str, int] = {}
        """TPCs of each device that are in open grants."""
        self._watts: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._open)

    def holds(self, grant: str) -> bool:
        """Whether the grant is open."""
        return grant in self._open

    def begin(self, record: GrantRecord, now: float) -> None:
        """The grant was handed out, or (after a restart) is accounted until `now`."""
        tpcs = sum(len(s.tpcs) for s in record.shares)
        devices = sum(len(s.tpcs) / self._tpcs.get(s.uuid, len(s.tpcs)) for s in record.shares if s.tpcs)
        memory = sum(s.memory for s in record.shares)
        self._open[record.grant] = _Open(record, now, devices, tpcs, memory)
        self._count(record, 1)

    def change(self, record: GrantRecord, now: float) -> list[UseLine]:
        """The open grant holds other TPCs from now on: what it used until now."""
        lines: dict[Key, Amounts] = {}
        one = self._open.pop(record.grant, None)
        if one is not None:
            _deal_out(one, now, self._draws(one), lines)
            self._count(one.record, -1)
            self.begin(record, one.at)
        return _lines(lines)

    def end(self, grant: str, now: float, used: bool = True) -> list[UseLine]:
        """What is left of it. used: a cell ran on it (false: its claim was lost; the device was held nevertheless)."""
        lines: dict[Key, Amounts] = {}
        one = self._open.pop(grant, None)
        if one is not None:
            _deal_out(one, now, self._draws(one), lines)
            last = _key(one, max(one.at, now))
            lines.setdefault(last, Amounts()).cells += used
            self._count(one.record, -1)
        return _lines(lines)

    def _count(self, record: GrantRecord, sign: int) -> None:
        for share in record.shares:
            self._granted[share.uuid] = self._granted.get(share.uuid, 0) + sign * len(share.tpcs)

    def clock_set(self, step: float) -> None:
        """The caller's clock was set by so many seconds: what was accounted stays."""
        for one in self._open.values():
            one.at += step

    def open(self) -> list[tuple[GrantRecord, float]]:
        """The open grants, and up to when each is accounted."""
        return [(one.record, one.at) for one in self._open.values()]

    def settle(self, now: float) -> list[UseLine]:
        """What the open grants used since they were accounted last."""
        lines: dict[Key, Amounts] = {}
        for one in self._open.values():
            _deal_out(one, now, self._draws(one), lines)
        return _lines(lines)

    def power(self, watts: Mapping[str, float]) -> None:
        """What devices (by UUID) draw from now on, where they tell. It is shared by the TPCs of each that are granted;
        what an idle device draws is nobody's. The caller settles before."""
        self._watts = dict(watts)

    def _draws(self, one: _Open) -> float:
        """Watts of this grant now."""
        if not self._watts:
            return 0.0
        return sum(
            self._watts.get(s.uuid, 0.0) * len(s.tpcs) / max(self._granted.get(s.uuid, 0), 1) for s in one.record.shares
        )


def _deal_out(one: _Open, now: float, watts: float, lines: dict[Key, Amounts]) -> None:
    begin, until = one.at, max(one.at, now)  # a clock that was set back accounts nothing twice
    while begin < until:
        end = min(until, (begin // HOUR + 1) * HOUR)
        amounts, seconds = lines.setdefault(_key(one, begin), Amounts()), end - begin
        amounts.seconds += seconds
        amounts.device_seconds += seconds * one.devices
        amounts.tpc_seconds += seconds * one.tpcs
        amounts.byte_seconds += seconds * one.memory
        amounts.joules += seconds * watts
        begin = end
    one.at = until


def _key(one: _Open, at: float) -> Key:
    record = one.record
    return int(at // HOUR), record.owner, tuple(sorted(set(record.groups))), record.kernel


def _lines(lines: Mapping[Key, Amounts]) -> list[UseLine]:
    return [
        UseLine(hour=hour, owner=owner, groups=groups, kernel=kernel, **vars(amounts))
        for (hour, owner, groups, kernel), amounts in lines.items()
    ]
