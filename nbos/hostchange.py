"""What an admin changes in a host's record, for its daemon to obey: whether it drains, which GPUs are out of use.

Guarantees: the record is changed only as it stood when it was read, under the lease of its daemon, so that it ends with
the daemon as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.kv import Txn, mod_is, op_put
from nbos_cluster.records import HostRecord

_TRIES = 10


class DrainFailed(RuntimeError):
    """Says why and the way out."""


async def set_draining(etcd: Etcd, host: str, draining: bool) -> None:
    """Raises DrainFailed when there is no such host."""
    await change_host(etcd, host, lambda record: msgspec.structs.replace(record, draining=draining))


async def close_gpus(etcd: Etcd, host: str, gpus: Sequence[str], reason: str, undo: bool) -> list[str]:
    """Take these GPUs (numbers or UUIDs) out of use, or allow their use again; their UUIDs. A MIG instance goes with
    its GPU. Raises DrainFailed when there is no such host or GPU."""
    found: list[str] = []

    def change(record: HostRecord) -> HostRecord:
        found[:] = dict.fromkeys(_gpu(record, name) for name in gpus)
        closed, reopened = dict(record.closed), dict(record.reopened)
        for gpu in found:
            closed.pop(gpu, None)
            if undo:
                reopened[gpu] = reopened.get(gpu, 0) + 1
            else:
                closed[gpu] = reason
        return msgspec.structs.replace(record, closed=closed, reopened=reopened)

    await change_host(etcd, host, change)
    return found


def _gpu(record: HostRecord, name: str) -> str:
    """The UUID of the GPU called `name`, or of the one whose MIG instance it is. Raises DrainFailed."""
    for device in record.devices:
        if name in (device.uuid, device.parent, str(device.index)):
            return device.parent or device.uuid
    there = ", ".join(f"{d.index} ({d.uuid}, {d.model})" for d in record.devices) or "none"
    raise DrainFailed(f"host {record.name} has no GPU {name!r}; it has: {there}")


async def change_host(etcd: Etcd, host: str, change: Callable[[HostRecord], HostRecord]) -> None:
    """Put the changed record where the read one stands. Raises DrainFailed when there is no such host."""
    key = keys.host(host)
    for _ in range(_TRIES):
        found = await etcd.get(key)
        if found is None:
            names = [kv.key.removeprefix(keys.HOSTS) for kv in (await etcd.range(keys.HOSTS))[0]]
            there = [name for name in names if "/" not in name]
            raise DrainFailed(f"no host {host!r} is there; there are: {', '.join(there) or 'none'}")
        record = records.decode(found.value, HostRecord)
        changed = change(record)
        if changed == record:
            return
        value = records.encode(changed)
        if (await etcd.commit(Txn([mod_is(key, found.mod_revision)], [op_put(key, value, found.lease)]))).succeeded:
            return
    raise DrainFailed(f"the record of host {host} keeps changing; try again")
