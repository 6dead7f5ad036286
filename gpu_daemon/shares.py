"""Who is owed what on a host: guaranteed quotas, weights of the fair share, priorities; as configured. No IO.

One table, `GPUDaemon.shares`: "default", "users", "groups" and "kernels". A quota is what its user, its group
(together) or its kernel is guaranteed on *this* host: a request that stays within it goes before those that do not.
What an owner does not use of it is used by others. Of weight and priority a user's own entry wins over groups, of
several groups the most generous wins; a kernel's priority wins over its owner's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gpu_daemon.ledger import GIB
from gpu_daemon.sizes import parse_bytes
from nbos_cluster.records import Device, GrantRecord, Resources

FIELDS = ("weight", "priority", "tpcs", "devices", "memory")
Kind = Literal["users", "groups", "kernels"]
Principal = tuple[Kind, str]
"""Somebody who may be owed something: ("groups", "vision")."""


class SharesError(ValueError):
    """The table cannot be used; names the entry, the limit and the way out."""


@dataclass(frozen=True)
class Entry:
    """weight, priority: None where the entry does not say. tpcs (in slices), devices (whole ones) and memory (bytes,
    0 = no bound of its own) are the quota."""

    weight: float | None = None
    priority: int | None = None
    tpcs: int = 0
    devices: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Standing:
    """What the table says about one kernel of one owner. quotas: whose quota its cells may be within."""

    weight: float
    priority: int
    quotas: tuple[tuple[Principal, Entry], ...] = ()


@dataclass(frozen=True)
class Shares:
    default: Entry = field(default_factory=Entry)
    users: Mapping[str, Entry] = field(default_factory=dict)
    groups: Mapping[str, Entry] = field(default_factory=dict)
    kernels: Mapping[str, Entry] = field(default_factory=dict)

    def of(self, owner: str, groups: Iterable[str], kernel: str) -> Standing:
        own, special = self.users.get(owner), self.kernels.get(kernel)
        shared = [(name, self.groups[name]) for name in groups if name in self.groups]
        quotas: list[tuple[Principal, Entry]] = []
        if special is not None:
            quotas.append((("kernels", kernel), special))
        if own is not None:
            quotas.append((("users", owner), own))
        quotas += [(("groups", name), entry) for name, entry in shared]
        entries = [entry for _, entry in shared]
        weight = _first(own.weight if own else None, _most(e.weight for e in entries), self.default.weight, 1.0)
        priority = _first(
            special.priority if special else None,
            own.priority if own else None,
            _most(e.priority for e in entries),
            self.default.priority,
            0,
        )
        return Standing(weight, int(priority), tuple((p, e) for p, e in quotas if e.tpcs or e.devices))

    def check(self, host: str, devices: Iterable[Device]) -> None:
        """Raise SharesError when the quotas together are more than the host has."""
        found = list(devices)
        entries = [*self.users.values(), *self.groups.values(), *self.kernels.values()]
        whole, tpcs = sum(e.devices for e in entries), sum(e.tpcs for e in entries)
        if whole > len(found):
            raise SharesError(
                f"shares: quotas guarantee {whole} whole devices, host {host} has {len(found)}; guarantee at most that"
            )
        largest = sorted((d.tpcs for d in found), reverse=True)
        left = sum(largest[whole:])
        if tpcs > left:
            raise SharesError(
                f"shares: quotas guarantee {tpcs} TPCs besides {whole} whole devices, host {host} then has {left}; "
                "guarantee at most that"
            )
        memory, there = sum(e.memory for e in entries), sum(d.memory for d in found)
        if memory > there:
            raise SharesError(
                f"shares: quotas guarantee {memory / GIB:.1f} GiB, the devices of host {host} have "
                f"{there / GIB:.1f} GiB; guarantee at most that"
            )


def _first(*values: float | None) -> float:
    return next(v for v in values if v is not None)


def _most(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def read_shares(config: Mapping[str, Any]) -> Shares:
    """The table in a configuration. Raises SharesError that names the wrong entry."""
    parts = ("default", "users", "groups", "kernels")
    unknown = set(config) - set(parts)
    if unknown:
        raise SharesError(f"shares: unknown part {sorted(unknown)[0]!r}; there are {', '.join(parts)}")
    default = _entry("default", config.get("default", {}), ("weight", "priority"))
    tables: dict[str, dict[str, Entry]] = {}
    for part in parts[1:]:
        table = config.get(part, {})
        if not isinstance(table, Mapping):
            raise SharesError(f"shares: {part!r} must map names to entries, not be {table!r}")
        # The fair share is between owners: a kernel has no weight of its own.
        known = FIELDS if part != "kernels" else FIELDS[1:]
        tables[part] = {str(name): _entry(f"{part}.{name}", one, known) for name, one in table.items()}
    return Shares(default, tables["users"], tables["groups"], tables["kernels"])


def _entry(where: str, raw: Any, known: tuple[str, ...]) -> Entry:
    if not isinstance(raw, Mapping):
        raise SharesError(f"shares: {where!r} must be a dict with some of {', '.join(known)}")
    unknown = set(raw) - set(known)
    if unknown:
        raise SharesError(f"shares: {where}.{sorted(unknown)[0]} is unknown; there are {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        values[name] = _value(f"shares: {where}.{name}", name, value)
    if values.get("memory") and not (values.get("tpcs") or values.get("devices")):
        raise SharesError(f"shares: {where}.memory alone guarantees nothing; name tpcs or devices as well")
    return Entry(**values)


def _value(where: str, name: str, value: Any) -> float | int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "weight":
        if not number or not 0 < value < 1e6:
            raise SharesError(f"{where} must be a number above 0 (1 is everybody's), not {value!r}")
        return float(value)
    if name == "memory" and isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as err:
            raise SharesError(f"{where}: {err}") from err
    low = -1000 if name == "priority" else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise SharesError(f"{where} must be a whole number from {low} up, not {value!r}")
    if name == "priority" and value > 1000:
        raise SharesError(f"{where} is {value}; priorities go from -1000 to 1000")
    return value


@dataclass
class Held:
    """What somebody holds now: TPCs in slices, whole devices, bytes."""

    tpcs: int = 0
    devices: int = 0
    memory: int = 0
    grants: int = 0


class Holdings:
    """What every user, group and kernel holds on this host, counted along; what is on loan is not theirs."""

    def __init__(self) -> None:
        self._held: dict[Principal, Held] = {}
        self._groups: dict[str, tuple[str, ...]] = {}
        """Of the owners who hold something."""

    def add(self, record: GrantRecord, sign: int = 1) -> None:
        """sign -1: the grant was given back."""
        tpcs = devices = memory = 0
        for share in record.shares:
            devices += share.whole
            tpcs += 0 if share.whole else len(share.tpcs) - len(share.lent)
            memory += share.memory
        for principal in principals(record.owner, record.groups, record.kernel):
            held = self._held.setdefault(principal, Held())
            held.tpcs += sign * tpcs
            held.devices += sign * devices
            held.memory += sign * memory
            held.grants += sign
            if not held.grants:
                del self._held[principal]
        if ("users", record.owner) in self._held:
            self._groups[record.owner] = record.groups
        else:
            self._groups.pop(record.owner, None)

    def of(self, kind: Kind, name: str) -> Held:
        return self._held.get((kind, name), _NOTHING)

    def owners(self) -> Mapping[str, tuple[str, ...]]:
        """Who holds something, with their groups."""
        return self._groups

    def within(self, quotas: Iterable[tuple[Principal, Entry]], resources: Resources, memory: int) -> Principal | None:
        """Whose quota the request would stay within; memory: the bytes that it would get in all."""
        for principal, quota in quotas:
            held = self._held.get(principal, _NOTHING)
            if resources.gpus:
                fits = held.devices + resources.gpus <= quota.devices
            else:
                fits = held.tpcs + resources.tpcs <= quota.tpcs
            if fits and (not quota.memory or held.memory + memory <= quota.memory):
                return principal
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Holdings) and (self._held, self._groups) == (other._held, other._groups)


_NOTHING = Held()


def principals(owner: str, groups: Iterable[str], kernel: str) -> list[Principal]:
    return [("users", owner), ("kernels", kernel), *(("groups", group) for group in dict.fromkeys(groups))]
