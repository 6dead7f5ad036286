"""Small records for the tests of the gateway's copy, models and page."""

from __future__ import annotations

from nbos_cluster import keys, membership, records
from nbos_cluster.kv import KV, Changes, Event, Snapshot
from nbos_cluster.records import Device, GrantRecord, HostRecord, KernelSpec, Record, ReplicaRecord
from nbos_spawner.gateway.copy import ClusterCopy


def host(name: str, *, draining: bool = False) -> HostRecord:
    device = Device(uuid=f"SIM-{name}", index=0, model="H100", tpcs=66, memory=80 << 30, kind="simulated")
    return HostRecord(name=name, address="127.0.0.1", pid=1, devices=(device,), draining=draining)


def spec(kernel: str, owner: str = "ada", *hosts: str) -> KernelSpec:
    placement = {str(i): name for i, name in enumerate(hosts or ("a", "b", "c"))}
    return KernelSpec(
        kernel=kernel,
        owner=owner,
        replicas=len(placement),
        placement=placement,
        key="the-key",
        curve_publickey="public",
        curve_secretkey="the-secret",
    )


def replica(index: int, host: str, **fields: object) -> ReplicaRecord:
    return ReplicaRecord(index=index, host=host, state="ready", pid=100 + index, **fields)  # type: ignore[arg-type]


def put(key: str, record: Record, revision: int = 1) -> Changes:
    return Changes([Event("put", KV(key, records.encode(record), revision))], revision)


def gone(key: str, revision: int = 2) -> Changes:
    return Changes([Event("delete", KV(key, b"", revision))], revision)


def kernel_kvs(one: KernelSpec) -> list[KV]:
    """What `membership.create` writes."""
    return [KV(op.key, op.value, 1, 1) for op in membership.create(one).success]


def filled(*specs: KernelSpec, hosts: tuple[str, ...] = ("a", "b", "c")) -> ClusterCopy:
    copy = ClusterCopy()
    copy.apply_hosts(Snapshot([KV(keys.host(name), records.encode(host(name)), 1) for name in hosts], 1), now=0.0)
    copy.apply_queues(Snapshot([], 1))
    copy.apply_kernels(Snapshot([kv for one in specs for kv in kernel_kvs(one)], 1), now=0.0)
    return copy


def grant(host: str, owner: str, kernel: str) -> GrantRecord:
    return GrantRecord(grant=f"g-{kernel}", host=host, owner=owner, kernel=kernel, replica=0, n=3, shares=())
