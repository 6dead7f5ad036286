"""What callers are shown of hosts and their GPUs, as plain JSON (docs/protocol.md, section 3). No IO.

How a device is, all may know who may use it; whose cells and processes are on it, their owner and Hub admins only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from nbos_cluster.records import Device, GrantRecord, HostRecord, Leftover, Reading

from .auth import Caller
from .copy import ClusterCopy


def host_model(host: HostRecord, copy: ClusterCopy, caller: Caller, replicas: Mapping[str, int]) -> dict[str, Any]:
    """replicas: how many are placed, by host."""
    grants = list(copy.grants.get(host.name, {}).values())
    readings = {reading.uuid: reading for reading in host.readings}
    return {
        "name": host.name,
        "address": host.address,
        "pid": host.pid,
        "version": host.version,
        "driver": host.driver,
        "draining": host.draining,
        "since": host.since,
        "cpus": host.cpus,
        "memory": host.memory,
        "replicas": replicas.get(host.name, 0),
        "max_replicas": host.max_replicas,
        "warm": [msgspec.structs.asdict(warm) for warm in host.warm],
        "devices": [
            device_model(device, grants, readings.get(device.uuid), caller, host.clocks.get(device.uuid))
            | {"left": [left_model(one) for one in host.left if one.uuid == device.uuid and _is_of(caller, one.owner)]}
            for device in host.devices
        ],
        "grants": [msgspec.to_builtins(grant) for grant in grants if _is_of(caller, grant.owner)],
    }


def device_model(
    device: Device,
    grants: list[GrantRecord],
    reading: Reading | None,
    caller: Caller,
    clock: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """reading: None where nothing is read, of simulated devices and of those that do not answer. clock: to how many
    MHz, of how many, its clocks are locked; None: they are not."""
    shares = [s for g in grants for s in g.shares if s.uuid == device.uuid]
    return {
        "uuid": device.uuid,
        "index": device.index,
        "model": device.model,
        "kind": device.kind,
        "tpcs": device.tpcs,
        "tpcs_granted": sum(len(s.tpcs) for s in shares),
        "sms": device.sms,
        "memory": device.memory,
        "memory_granted": sum(s.memory for s in shares),
        "capability": device.capability,
        "parent": device.parent,
        "healthy": device.healthy,
        "reason": device.reason,
        "passing": device.passing,
        "clock": list(clock) if clock is not None else None,
        "reading": reading_model(reading, caller) if reading is not None else None,
    }


def left_model(left: Leftover) -> dict[str, Any]:
    fields = ("kernel", "replica", "owner", "memory", "tier")
    return {name: getattr(left, name) for name in fields}


def reading_model(reading: Reading, caller: Caller) -> dict[str, Any]:
    shown = [process for process in reading.processes if _is_of(caller, process.owner)]
    fields = ("pid", "memory", "kernel", "replica", "owner")
    return {
        "memory": reading.memory,
        "utilisation": reading.utilisation,
        "temperature": reading.temperature,
        "power": reading.power,
        "power_limit": reading.power_limit,
        "ecc": reading.ecc,
        "processes": [{name: getattr(process, name) for name in fields} for process in shown],
        "others": len(reading.processes) - len(shown),
        "notes": list(reading.notes),
        "untold": dict(reading.untold),
    }


def _is_of(caller: Caller, owner: str) -> bool:
    return caller.admin or (caller.kind == "user" and caller.name == owner)
