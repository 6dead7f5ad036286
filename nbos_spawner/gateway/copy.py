"""The gateway's copy of what etcd holds: hosts, grants, queues and kernels, fed by watches. No IO, no clock.

It must guarantee: a host that went missing is remembered with the time since when, and keeps its name until
it is back or no kernel is placed on it; a record that cannot be read hides itself only.
"""

from __future__ import annotations

from collections.abc import Iterable

from nbos_cluster import keys, records
from nbos_cluster.kernelview import KernelView, KernelViews
from nbos_cluster.kv import KV, Changes, Snapshot
from nbos_cluster.records import GrantRecord, HostRecord, QueueTicket, RecordError


class ClusterCopy:
    """hosts: live ones by name. absent: names of hosts that kernels are placed on but that are away, since
    when."""

    def __init__(self) -> None:
        self.hosts: dict[str, HostRecord] = {}
        self.grants: dict[str, dict[str, GrantRecord]] = {}
        self.tickets: dict[str, QueueTicket] = {}
        self.kernels = KernelViews()
        self.absent: dict[str, float] = {}
        self.unreadable: dict[str, str] = {}

    def apply_hosts(self, item: Snapshot | Changes, now: float) -> None:
        """Take in what the watch of `keys.HOSTS` delivered at `now` (any steady clock)."""
        if isinstance(item, Snapshot):
            gone = set(self.hosts)
            self.hosts, self.grants = {}, {}
            for kv in item.kvs:
                self._put_host(kv)
            for name in gone - set(self.hosts):
                self.absent.setdefault(name, now)
        else:
            for event in item.events:
                if event.kind == "put":
                    self._put_host(event.kv)
                else:
                    self._delete_host(event.kv.key, now)
        for name in self.hosts:
            self.absent.pop(name, None)

    def _put_host(self, kv: KV) -> None:
        name, _, rest = kv.key.removeprefix(keys.HOSTS).partition("/")
        self.unreadable.pop(kv.key, None)
        try:
            if not rest:
                self.hosts[name] = records.decode(kv.value, HostRecord)
            else:
                self.grants.setdefault(name, {})[kv.key] = records.decode(kv.value, GrantRecord)
        except RecordError as err:
            self.unreadable[kv.key] = str(err)

    def _delete_host(self, key: str, now: float) -> None:
        name, _, rest = key.removeprefix(keys.HOSTS).partition("/")
        self.unreadable.pop(key, None)
        if rest:
            self.grants.get(name, {}).pop(key, None)
        elif self.hosts.pop(name, None) is not None:
            self.absent.setdefault(name, now)

    def apply_queues(self, item: Snapshot | Changes) -> None:
        if isinstance(item, Snapshot):
            self.tickets = {}
        events = item.kvs if isinstance(item, Snapshot) else [e.kv for e in item.events if e.kind == "put"]
        for kv in events:
            try:
                self.tickets[kv.key] = records.decode(kv.value, QueueTicket)
            except RecordError as err:
                self.unreadable[kv.key] = str(err)
        if isinstance(item, Changes):
            for event in item.events:
                if event.kind == "delete":
                    self.tickets.pop(event.kv.key, None)
                    self.unreadable.pop(event.kv.key, None)

    def apply_kernels(self, item: Snapshot | Changes, now: float) -> None:
        changed = self.kernels.apply(item)
        for kernel in changed:
            view = self.kernels.views.get(kernel)
            for host in view.spec.placement.values() if view and view.spec else ():
                if host not in self.hosts:  # placed on a host that we never saw: count from now
                    self.absent.setdefault(host, now)

    def forget_absent(self) -> None:
        """Drop the names of absent hosts that no kernel needs any more."""
        used = {host for view in self.living() if view.spec for host in view.spec.placement.values()}
        self.absent = {name: since for name, since in self.absent.items() if name in used}

    def living(self) -> list[KernelView]:
        """The kernels that have a spec."""
        return [view for view in self.kernels.views.values() if view.spec is not None]

    def kernel(self, kernel_id: str) -> KernelView | None:
        view = self.kernels.views.get(kernel_id)
        return view if view is not None and view.spec is not None else None

    def owned_by(self, owner: str) -> list[KernelView]:
        return [view for view in self.living() if view.spec is not None and view.spec.owner == owner]

    def replicas_on(self) -> dict[str, int]:
        """How many replicas are placed on each host."""
        count: dict[str, int] = {}
        for view in self.living():
            for host in view.spec.placement.values() if view.spec else ():
                count[host] = count.get(host, 0) + 1
        return count

    def tickets_of(self, kernels: Iterable[str]) -> list[QueueTicket]:
        wanted = set(kernels)
        return sorted((t for t in self.tickets.values() if t.kernel in wanted), key=lambda t: (t.host, t.position))
