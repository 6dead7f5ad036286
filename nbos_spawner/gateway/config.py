"""The gateway's configuration, from its environment: JupyterHub's own variables, and ours.

NBOS_ETCD_ENDPOINTS  host:port, separated by commas
NBOS_ETCD_CA, NBOS_ETCD_CERT, NBOS_ETCD_KEY  PEM files; all three, or none for an etcd without TLS
NBOS_LIMITS          the same table as the spawner's `limits`, as JSON
NBOS_HOST_GRACE      seconds a host may be away before its replicas are placed elsewhere (10)
NBOS_AT_A_TIME       replicas that draining hosts move, and that are made anew for lost hosts, at the same time (4)
NBOS_DIE_WITH_PARENT set: end when the hub does (a hub that was killed starts a new gateway)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

from nbos_cluster.etcd import TLSFiles

from ..limits import LimitsError, LimitTable, read_limits


class ConfigError(ValueError):
    """The environment is not enough to run; says which variable and what it must be."""


@dataclass(frozen=True)
class GatewayConfig:
    endpoints: tuple[str, ...]
    tls: TLSFiles | None
    address: str
    port: int
    prefix: str
    limits: LimitTable = field(default_factory=LimitTable)
    host_grace: float = 10.0
    at_a_time: int = 4
    die_with_parent: bool = False


def read_config(env: Mapping[str, str] = os.environ) -> GatewayConfig:
    """The configuration in `env`. Raises ConfigError."""
    where = urlparse(env.get("JUPYTERHUB_SERVICE_URL", "http://127.0.0.1:8765"))
    endpoints = tuple(_words(env.get("NBOS_ETCD_ENDPOINTS", "")))
    if not endpoints:
        raise ConfigError("NBOS_ETCD_ENDPOINTS is not set; it must name etcd, e.g. 127.0.0.1:2379")
    return GatewayConfig(
        endpoints=endpoints,
        tls=_tls(env),
        address=where.hostname or "127.0.0.1",
        port=where.port or 80,
        prefix=env.get("JUPYTERHUB_SERVICE_PREFIX", "/services/nbos/"),
        limits=_limits(env.get("NBOS_LIMITS", "")),
        host_grace=_seconds(env.get("NBOS_HOST_GRACE", "10")),
        at_a_time=_count(env.get("NBOS_AT_A_TIME", "4")),
        die_with_parent=bool(env.get("NBOS_DIE_WITH_PARENT")),
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _tls(env: Mapping[str, str]) -> TLSFiles | None:
    names = ("NBOS_ETCD_CA", "NBOS_ETCD_CERT", "NBOS_ETCD_KEY")
    given = [env.get(name, "") for name in names]
    if not any(given):
        return None
    for name, value in zip(names, given, strict=True):
        if not value or not os.access(value, os.R_OK):
            raise ConfigError(f"{name}={value!r} must be a PEM file this user can read; set all of {', '.join(names)}")
    return TLSFiles(*(Path(value) for value in given))


def _limits(text: str) -> LimitTable:
    if not text:
        return LimitTable()
    try:
        return read_limits(json.loads(text))
    except (LimitsError, json.JSONDecodeError) as err:
        raise ConfigError(f"NBOS_LIMITS: {err}") from err


def _seconds(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError as err:
        raise ConfigError(f"NBOS_HOST_GRACE={text!r} must be seconds") from err


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise ConfigError(f"NBOS_AT_A_TIME={text!r} must be a number of replicas from 1 to 1000")
    return int(text)
