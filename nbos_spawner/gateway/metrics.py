"""The gateway's metrics for Prometheus (docs/metrics.md): the calls it answers, and the cluster as its copy shows it.

Guarantees: no label holds a user's name, a kernel's or anything that a caller chose; only a token with the scope
`read:metrics`, which guards the Hub's own metrics, is shown them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import prometheus_client
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from tornado.web import RequestHandler

from nbos_cluster.records import Move

from ..scopes import METRICS
from .copy import ClusterCopy
from .errors import ApiError
from .handlers import AuthenticatedHandler
from .models import member_model
from .moves import to_leave

CALLS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Buckets of the time of a call."""

MOVES = (1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
"""Buckets of the time of a replica's move."""


@dataclass(frozen=True)
class Gauge:
    name: str
    text: str
    labels: tuple[str, ...] = ()


GAUGES = (
    Gauge("nbos_gateway_ready", "1 once this gateway has read the cluster's records."),
    Gauge("nbos_gateway_hosts", "Hosts of the cluster: up, draining, or away and still needed.", ("state",)),
    Gauge("nbos_gateway_kernels", "Kernels of the cluster."),
    Gauge("nbos_gateway_replicas", "Replicas of the cluster, as their daemons tell; missing: none does.", ("state",)),
    Gauge("nbos_gateway_moves", "Replicas that are on their way to another host, by the phase.", ("phase",)),
    Gauge("nbos_gateway_moves_waiting", "Kernels on draining hosts of which no replica is on its way yet."),
    Gauge("nbos_gateway_claims", "Cells that run now, or did less than a second ago in a row of quick ones."),
    Gauge("nbos_gateway_grants", "Grants of GPUs that cells hold."),
    Gauge("nbos_gateway_tickets", "Places that cells hold in the hosts' queues; a cell waits on several hosts."),
    Gauge("nbos_gateway_tpcs", "TPCs of all hosts' healthy devices, by model.", ("model",)),
    Gauge("nbos_gateway_tpcs_granted", "TPCs that cells hold, by model.", ("model",)),
    Gauge("nbos_gateway_devices_unhealthy", "Devices that cells are granted no part of."),
    Gauge("nbos_gateway_unreadable_records", "Records in etcd that this version cannot read."),
)


class Cluster(Collector):
    """What the copy shows when it is asked."""

    def __init__(self, copy: ClusterCopy, ready: Any) -> None:
        self._copy, self._ready = copy, ready

    def collect(self) -> Iterable[Metric]:
        values = self.read()
        for gauge in GAUGES:
            family = GaugeMetricFamily(gauge.name, gauge.text, labels=gauge.labels)
            for labels, value in values[gauge.name].items():
                family.add_metric(labels, value)
            yield family

    def read(self) -> dict[str, dict[tuple[str, ...], float]]:
        copy = self._copy
        grants = [grant for of_host in copy.grants.values() for grant in of_host.values()]
        devices = [device for host in copy.hosts.values() for device in host.devices]
        hosts: Counter[tuple[str, ...]] = Counter({("up",): 0, ("draining",): 0, ("away",): len(copy.absent)})
        hosts.update(("draining",) if host.draining else ("up",) for host in copy.hosts.values())
        tpcs: Counter[tuple[str, ...]] = Counter()
        granted: Counter[tuple[str, ...]] = Counter()
        for device in devices:
            tpcs[(device.model,)] += device.tpcs if device.healthy else 0
            granted[(device.model,)] += 0
        for grant in grants:
            for share in grant.shares:
                granted[(share.model,)] += len(share.tpcs)
        return {
            "nbos_gateway_ready": {(): self._ready()},
            "nbos_gateway_hosts": dict(hosts),
            "nbos_gateway_kernels": {(): len(copy.living())},
            "nbos_gateway_replicas": dict(self._replicas()),
            "nbos_gateway_moves": dict(self._moves()),
            "nbos_gateway_moves_waiting": {(): len(to_leave(copy))},
            "nbos_gateway_claims": {(): sum(len(view.claims) for view in copy.living())},
            "nbos_gateway_grants": {(): len(grants)},
            "nbos_gateway_tickets": {(): len(copy.tickets)},
            "nbos_gateway_tpcs": dict(tpcs),
            "nbos_gateway_tpcs_granted": dict(granted),
            "nbos_gateway_devices_unhealthy": {(): sum(not device.healthy for device in devices)},
            "nbos_gateway_unreadable_records": {(): len(copy.unreadable)},
        }

    def _replicas(self) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter({(state,): 0 for state in ("starting", "ready", "failed", "missing")})
        for view in self._copy.living():
            assert view.spec is not None
            found.update((str(member_model(view, view.spec, index)["state"]),) for index in view.spec.placement)
        return found

    def _moves(self) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter({(phase,): 0 for phase in ("joining", "leaving", "returning")})
        specs = [view.spec for view in self._copy.living()]
        found.update((spec.move.phase,) for spec in specs if spec is not None and spec.move is not None)
        return found


class GatewayMetrics:
    """ready: says whether the records have been read."""

    def __init__(self, copy: ClusterCopy, ready: Any) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        self._requests = prometheus_client.Counter(
            "nbos_gateway_requests",
            "Requests answered, by the call, its method and the status.",
            ["call", "method", "code"],
            registry=self.registry,
        )
        self._seconds = prometheus_client.Histogram(
            "nbos_gateway_request_seconds",
            "Time of a request; `wait` holds it until a kernel is ready.",
            ["call"],
            buckets=CALLS,
            registry=self.registry,
        )
        self._moves = prometheus_client.Histogram(
            "nbos_gateway_move_seconds",
            "Time from the beginning of a replica's move to its end, by who wanted it and how it ended.",
            ["why", "ended"],
            buckets=MOVES,
            registry=self.registry,
        )
        self.registry.register(Cluster(copy, ready))

    def answered(self, handler: RequestHandler) -> None:
        """Called by tornado when a request has its answer."""
        call = _call(handler)
        method = str(handler.request.method)
        known = method if method in handler.SUPPORTED_METHODS else "other"
        self._requests.labels(call, known, str(handler.get_status())).inc()
        self._seconds.labels(call).observe(handler.request.request_time())

    def moved(self, move: Move, ended: str, at: float) -> None:
        """A replica's move has come to its end at `at` (Unix time): `done` or `undone`."""
        self._moves.labels(move.why, ended).observe(max(0.0, at - move.since))


class MetricsHandler(AuthenticatedHandler):
    """GET metrics: for a token with `read:metrics`."""

    def get(self) -> None:
        if not self.caller.metrics:
            raise ApiError(403, "scope", f"this token may not read metrics; it needs the scope {METRICS}")
        encode, content_type = choose_encoder(self.request.headers.get("Accept", ""))
        self.set_header("Content-Type", content_type)
        self.finish(encode(self.settings["metrics"].registry))


def _call(handler: RequestHandler) -> str:
    """`kernels`, `status`, …: by what answers, never by what was asked for."""
    name = type(handler).__name__.removesuffix("Handler").lower()
    return "wait" if name == "kernel" and handler.get_query_argument("wait", "") else name
