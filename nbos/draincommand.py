"""`nbos drain`: a host takes no new cells and replicas, and those it has are moved away; `--undo` takes it back.

Guarantees: the host's record is changed only as it stood when it was read, under the lease of its daemon, so that it
ends with the daemon as before. The daemon obeys, the gateway moves the replicas (`--wait`: until none is left).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import msgspec

from nbos_cluster import keys, records
from nbos_cluster.certs import CertError
from nbos_cluster.etcd import Etcd, EtcdError, EtcdUnavailable
from nbos_cluster.kv import Txn, mod_is, op_put
from nbos_cluster.records import HostRecord, KernelSpec, ReplicaRecord

from .etcdcommand import admin_files

_TRIES = 10


class DrainFailed(RuntimeError):
    """Says why and the way out."""


def run(options: argparse.Namespace) -> int:
    """The exit status."""
    try:
        asyncio.run(_run(options))
    except (CertError, EtcdError, EtcdUnavailable, DrainFailed, ValueError, OSError) as err:
        print(f"nbos drain: {err}", file=sys.stderr)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> None:
    endpoints = [part.strip() for part in options.endpoints.split(",") if part.strip()]
    async with Etcd(endpoints, admin_files(options.dir), timeout=10.0) as etcd:
        for host in options.hosts:
            await set_draining(etcd, keys.checked(host, "host name"), not options.undo)
            print(
                f"host {host} takes {'new cells and replicas again' if options.undo else 'no new cells and replicas'}"
            )
        if options.wait and not options.undo:
            await _until_empty(etcd, options.hosts, options.wait)


async def set_draining(etcd: Etcd, host: str, draining: bool) -> None:
    """Raises DrainFailed when there is no such host."""
    key = keys.host(host)
    for _ in range(_TRIES):
        found = await etcd.get(key)
        if found is None:
            names = [kv.key.removeprefix(keys.HOSTS) for kv in (await etcd.range(keys.HOSTS))[0]]
            there = [name for name in names if "/" not in name]
            raise DrainFailed(f"no host {host!r} is there; there are: {', '.join(there) or 'none'}")
        record = records.decode(found.value, HostRecord)
        if record.draining == draining:
            return
        value = records.encode(msgspec.structs.replace(record, draining=draining))
        if (await etcd.commit(Txn([mod_is(key, found.mod_revision)], [op_put(key, value, found.lease)]))).succeeded:
            return
    raise DrainFailed(f"the record of host {host} keeps changing; try again")


async def _until_empty(etcd: Etcd, hosts: list[str], seconds: float) -> None:
    """Raises DrainFailed when replicas are still there after so long."""
    deadline, said = time.monotonic() + seconds, -1
    while (left := await replicas_on(etcd, hosts)) > 0:
        if left != said:
            print(f"{left} replica{'s' if left > 1 else ''} to be moved")
            said = left
        if time.monotonic() > deadline:
            raise DrainFailed(
                f"{left} replicas are still on {', '.join(hosts)} after {seconds:g} s; the others may have no room "
                "(nbos status, the gateway's log). The host goes on draining; take it back with --undo"
            )
        await asyncio.sleep(0.5)
    print("no replica is left there; the daemon may be stopped")


async def replicas_on(etcd: Etcd, hosts: list[str]) -> int:
    """How many stand there, or are placed there."""
    found: set[tuple[str, str, str]] = set()
    for kv in (await etcd.range(keys.KERNELS))[0]:
        kernel, _, rest = kv.key.removeprefix(keys.KERNELS).partition("/")
        if rest == "spec":
            spec = records.decode(kv.value, KernelSpec)
            found |= {(kernel, index, host) for index, host in spec.placement.items()}
        elif kv.key.startswith(keys.replicas(kernel)):
            record = records.decode(kv.value, ReplicaRecord)
            found.add((kernel, str(record.index), record.host))
    return sum(host in hosts for _, _, host in found)
