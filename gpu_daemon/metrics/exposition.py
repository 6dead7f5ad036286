"""What the daemon tells when it is asked: how things stand now, beside what `meters` has counted, in Prometheus' form.

Guarantees: reading takes a fraction of a millisecond of the event loop; writing the text, which takes milliseconds, is
left to a thread that sees nothing of the daemon but what was read. Labels as in `meters`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpu_daemon.ledger import NOBODY, Busy, Ledger
from gpu_daemon.site import Site
from nbos_cluster.records import GrantRecord, Resources

DEVICE = ("device", "index", "model")

Waits = Callable[[], Iterable[tuple[str, Resources]]]
"""The owner of each cell that waits for GPUs, and what it asks for."""


@dataclass(frozen=True)
class Gauge:
    name: str
    text: str
    labels: tuple[str, ...] = ()


GAUGES = (
    Gauge("nbos_host_info", "1, with this host's name and its version of NBOS.", ("host", "version")),
    Gauge("nbos_host_draining", "1 while the host takes no new cells."),
    Gauge("nbos_device_healthy", "1 while cells may be granted parts of the device.", DEVICE),
    Gauge("nbos_device_tpcs", "TPCs of the device (1 TPC = 2 SMs).", DEVICE),
    Gauge("nbos_device_tpcs_granted", "Those of them that cells hold.", DEVICE),
    Gauge("nbos_device_tpcs_lent", "Those of them that are on loan.", DEVICE),
    Gauge("nbos_device_memory_bytes", "Memory of the device.", DEVICE),
    Gauge("nbos_device_memory_granted_bytes", "The part of it that cells hold.", DEVICE),
    Gauge("nbos_device_clock_part", "Its highest clock now, as a part of the chip's: 1 where not locked.", DEVICE),
    Gauge("nbos_device_grants", "Cells that hold a part of the device.", DEVICE),
    Gauge("nbos_device_memory_left_bytes", "What idle processes have on it, beyond what they are granted.", DEVICE),
    Gauge("nbos_waiting_cells", "Cells in this host's queue for GPUs, by what they wait for.", ("reason",)),
    Gauge("nbos_replicas", "Replicas on this host.", ("state",)),
    Gauge("nbos_replicas_max", "Replicas that this host takes."),
    Gauge("nbos_kernels", "Kernels with a replica on this host."),
    Gauge("nbos_etcd_up", "1 while etcd answers."),
)

Rows = dict[str, list[tuple[tuple[str, ...], float]]]


class Now(Collector):
    """`rows` is what was read last."""

    def __init__(self, owners: bool) -> None:
        self.rows: Rows = {}
        self._owners = owners

    def collect(self) -> Iterable[Metric]:
        for gauge in GAUGES:
            owned = self._owners and gauge.name == "nbos_waiting_cells"
            family = GaugeMetricFamily(gauge.name, gauge.text, labels=(*gauge.labels, *(["owner"] if owned else [])))
            for labels, value in self.rows.get(gauge.name, ()):
                family.add_metric(labels, value)
            yield family


class Exposition:
    """One daemon's metrics as text. `render` belongs to the daemon's event loop."""

    def __init__(self, site: Site, waits: Waits) -> None:
        self._site, self._waits = site, waits
        self._now = Now(site.meters.owners)
        site.meters.registry.register(self._now)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type. accept: the header of the request; plain text where it asks for nothing."""
        rows = self.read()
        encode, content_type = choose_encoder(accept)

        def write() -> bytes:
            self._now.rows = rows
            return bytes(encode(self._site.meters.registry))

        return await asyncio.to_thread(write), content_type

    def read(self) -> Rows:
        """How things stand now."""
        site = self._site
        states = Counter(replica.state for replica in site.replicas.values())
        return {
            **_devices(site.ledger, site.queue.grants.values(), site.power.caps() if site.power is not None else {}),
            "nbos_host_info": [((site.host, _version()), 1)],
            "nbos_host_draining": [((), site.draining)],
            "nbos_waiting_cells": self._waiting(),
            "nbos_replicas": [((state,), states[state]) for state in ("starting", "ready", "failed")],
            "nbos_replicas_max": [((), site.settings.max_replicas)],
            "nbos_kernels": [((), len({id.kernel for id in site.replicas}))],
            "nbos_etcd_up": [((), site.away_since is None)],
        }

    def _waiting(self) -> list[tuple[tuple[str, ...], float]]:
        found: Counter[tuple[str, ...]] = Counter()
        # Many wait for the same: what they wait for is looked up once.
        for (owner, resources), count in Counter(self._waits()).items():
            reason = reason_of(self._site.ledger, resources)
            found[(reason, owner) if self._site.meters.owners else (reason,)] += count
        if not self._site.meters.owners:
            found.update({("busy",): 0, ("kept",): 0})  # a queue that is empty is a zero, not a gap
        return list(found.items())


def reason_of(ledger: Ledger, resources: Resources) -> str:
    """`busy`: there is no room for it. `kept`: there is, and it is kept for somebody else (who waits longer, …)."""
    return "busy" if isinstance(ledger.fit(resources), Busy) else "kept"


def _devices(ledger: Ledger, held: Iterable[GrantRecord], caps: Mapping[str, tuple[int, int]]) -> Rows:
    rows: Rows = {gauge.name: [] for gauge in GAUGES if gauge.labels == DEVICE}
    tpcs: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    grants: Counter[str] = Counter()
    lent: Counter[str] = Counter()
    for grant in held:
        for share in grant.shares:
            tpcs[share.uuid] += len(share.tpcs)
            lent[share.uuid] += len(share.lent)
            memory[share.uuid] += share.memory
            grants[share.uuid] += 1
    left = {book.uuid: book.others_left(NOBODY) for book in ledger.books}
    for device in ledger.devices:
        labels = (device.uuid, str(device.index), device.model)
        values: dict[str, float] = {
            "nbos_device_healthy": device.healthy,
            "nbos_device_tpcs": device.tpcs,
            "nbos_device_tpcs_granted": tpcs[device.uuid],
            "nbos_device_tpcs_lent": lent[device.uuid],
            "nbos_device_memory_bytes": device.memory,
            "nbos_device_memory_granted_bytes": memory[device.uuid],
            "nbos_device_clock_part": caps[device.uuid][0] / caps[device.uuid][1] if device.uuid in caps else 1.0,
            "nbos_device_grants": grants[device.uuid],
            "nbos_device_memory_left_bytes": left[device.uuid],
        }
        for name, value in values.items():
            rows[name].append((labels, value))
    return rows


def _version() -> str:
    try:
        return metadata.version("nbos")
    except metadata.PackageNotFoundError:
        return ""
