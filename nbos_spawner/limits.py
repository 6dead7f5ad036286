"""What a user may ask for: bounds from the site's configuration, per user and group. No IO.

The same bounds hold in the options form (the hub) and in the gateway, which never trusts what a user's server
sends. A user's own entry wins over groups; of several groups the most generous value wins, field by field;
what neither names comes from the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .sizes import parse_size

MAX_REPLICAS = 5
"""More replicas only cost: five survive the loss of any four hosts."""


class LimitsError(ValueError):
    """The configured limits cannot be read; names the entry and what is allowed."""


@dataclass(frozen=True)
class Limits:
    """Bounds for one user. Sizes are bytes. 0 means: none of it at all; for `memory`, `replica_memory`, `server_memory`
    and `server_cpus`: no bound.

    gpus, tpcs, memory: what one cell may hold (whole devices, or a slice's TPCs; device memory on each
    device). replica_memory: resident memory of one replica. kernels: how many the user may have at a time. images:
    those that a kernel may run in besides the hosts' own (replicas in Docker only). server_memory, server_cpus: of the
    user's Jupyter Server, where that is a container.
    """

    replicas: int = MAX_REPLICAS
    gpus: int = 4
    tpcs: int = 132
    memory: int = 192 << 30
    replica_memory: int = 0
    kernels: int = 10
    images: tuple[str, ...] = ()
    server_memory: int = 0
    server_cpus: int = 0


_SIZES = ("memory", "replica_memory", "server_memory")
_NAMES = tuple(f.name for f in fields(Limits))


Entry = Mapping[str, "int | tuple[str, ...]"]
"""What a user or group has instead of the default."""


@dataclass(frozen=True)
class LimitTable:
    """All of a site's limits: a default, and what users and groups have instead."""

    default: Limits = field(default_factory=Limits)
    users: Mapping[str, Entry] = field(default_factory=dict)
    groups: Mapping[str, Entry] = field(default_factory=dict)

    def of(self, user: str, groups: Iterable[str] = ()) -> Limits:
        """The bounds of `user`, who is in `groups`."""
        chosen: dict[str, Any] = {}
        for group in groups:
            for name, value in self.groups.get(group, {}).items():
                chosen[name] = _more(value, chosen[name]) if name in chosen else value
        chosen.update(self.users.get(user, {}))
        return replace(self.default, **chosen)


def _more(one: Any, other: Any) -> Any:
    """The more generous of two bounds; of images, both lists."""
    return tuple(dict.fromkeys((*other, *one))) if isinstance(one, tuple) else max(one, other)


def read_limits(config: Mapping[str, Any]) -> LimitTable:
    """The table in `config`: {"default": {...}, "users": {name: {...}}, "groups": {name: {...}}}.

    Raises LimitsError that names the wrong entry.
    """
    unknown = set(config) - {"default", "users", "groups"}
    if unknown:
        raise LimitsError(f"limits: unknown part {sorted(unknown)[0]!r}; there are 'default', 'users' and 'groups'")
    return LimitTable(
        default=replace(Limits(), **dict[str, Any](_entry("default", config.get("default", {})))),
        users={name: _entry(f"users.{name}", one) for name, one in _mapping(config, "users").items()},
        groups={name: _entry(f"groups.{name}", one) for name, one in _mapping(config, "groups").items()},
    )


def _mapping(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    value = config.get(part, {})
    if not isinstance(value, Mapping):
        raise LimitsError(f"limits: {part!r} must map names to limits, not be {value!r}")
    return value


def _entry(where: str, entry: Any) -> Entry:
    if not isinstance(entry, Mapping):
        raise LimitsError(f"limits: {where!r} must be a dict with some of {', '.join(_NAMES)}")
    return {name: _value(where, name, value) for name, value in entry.items()}


def _value(where: str, name: str, value: Any) -> int | tuple[str, ...]:
    if name not in _NAMES:
        raise LimitsError(f"limits: {where}.{name} is unknown; there are {', '.join(_NAMES)}")
    if name == "images":
        return _images(where, value)
    try:
        number = parse_size(value) if name in _SIZES else value
    except ValueError as err:
        raise LimitsError(f"limits: {where}.{name}: {err}") from err
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise LimitsError(f"limits: {where}.{name} must be a whole number from 0 up, not {value!r}")
    if name == "replicas" and not 1 <= number <= MAX_REPLICAS:
        raise LimitsError(f"limits: {where}.replicas is {number}; a kernel has 1 to {MAX_REPLICAS} replicas")
    return number


def _images(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and is_image(v) for v in value):
        raise LimitsError(f"limits: {where}.images must be a list of image names such as 'lab/kernel:1', not {value!r}")
    return tuple(value)


def is_image(name: str) -> bool:
    """Whether `name` may be an image's name. Which images there are, the hosts' Engines know."""
    return re.fullmatch(r"[a-z0-9][A-Za-z0-9._/:@-]{0,254}", name) is not None
