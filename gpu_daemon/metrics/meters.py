"""What the daemon counts as it happens: Prometheus counters and histograms, one method for each thing that happens.

Guarantees: counting decides nothing, waits for nothing and costs a microsecond or less, also on the path of a bid; no
label holds a user's name, a kernel's or a text that a user wrote, unless `owners` asks for users' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from nbos_cluster.records import GrantRecord

QUICK = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets of what should take a millisecond: bids, etcd's transactions."""
STORING = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets of what a disk or a network has a part in: appends, blobs."""
LONG = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0)
"""Buckets of what people wait for: a GPU, a cell."""


class _Series(dict[tuple[str, ...], Any]):
    """A metric's series by the values of its labels: found in a tenth of the time that `labels` takes."""

    def __init__(self, metric: Any) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, key: tuple[str, ...]) -> Any:
        series = self[key] = self._metric.labels(*key)
        return series


class Meters:
    """owners: what concerns grants is also told by the user's name, one series each."""

    def __init__(self, owners: bool = False) -> None:
        # Each counter's time of birth as a series of its own would double what is stored, and nobody reads it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.owners = owners
        ProcessCollector(registry=self.registry)
        whose = ("kind", "owner") if owners else ("kind",)
        self._bids = self._counter("bids", "Bids answered, by the answer: lead, or the code of the yield.", ["answer"])
        self._bid_time = self._histogram(
            "bid_seconds", "From a bid to its answer, without the wait for room on the GPUs.", QUICK
        )
        self._grants = self._counter("grants", "Grants of GPUs that a cell got: of whole devices, or slices.", whose)
        self._touched = self._counter("touches", "Grants that a running cell asked for when it first used a GPU.")
        self._clocks = self._counter("clock_switches", "Times that a device's highest clock was set.")
        self._waited = self._histogram("gpu_wait_seconds", "How long cells that got GPUs waited for them.", LONG, whose)
        self._held = self._histogram("gpu_held_seconds", "How long cells held their GPUs.", LONG, whose)
        self._back = self._counter(
            "gave_back_bytes", "Bytes of GPU memory that idle cells' processes gave back for others, by tier.", ["tier"]
        )
        self._back_time = self._histogram("gave_back_seconds", "How long one of them took for it.", STORING, ["tier"])
        self._recalls = self._counter("recalls", "Times that a borrower was asked to give TPCs back.")
        self._recalled = self._counter("recalled_tpcs", "TPCs that were asked back.")
        self._give_back = self._histogram(
            "give_back_seconds", "From such a request until the borrower was off those TPCs.", STORING
        )
        self._refusals = self._counter("refusals", "Requests of replicas that were refused, by code.", ["code"])
        self._appends = self._histogram("append_seconds", "From an entry's arrival until it is in the log.", STORING)
        self._abandoned = self._counter("abandoned", "Executions that ended without an entry of their own.")
        self._blob_bytes = self._counter(
            "blob_bytes", "Bytes moved to (put) and from (get) the blob store.", ["operation"]
        )
        self._blob_time = self._histogram("blob_seconds", "Time of one call of the blob store.", STORING, ["operation"])
        self._blob_failures = self._counter("blob_failures", "Calls of the blob store that failed.", ["operation"])
        self._starts = self._counter("replica_starts", "Processes of replicas started.")
        self._restarts = self._counter("replica_restarts", "Those of them started in the place of one that ended.")
        self._ends = self._counter(
            "replica_ends", "Processes of replicas that ended: ended by the daemon, or by themselves.", ["by"]
        )
        self._etcd = self._histogram("etcd_transaction_seconds", "Time of one transaction that etcd answered.", QUICK)
        self._etcd_failures = self._counter("etcd_failures", "Transactions that etcd did not answer.")
        self._etcd_away = self._counter("etcd_away_seconds", "Time without an answer of etcd, told when it was over.")
        self._leases = self._counter("lease_losses", "Times that this host's lease ended and a new one was made.")

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        metric = Counter(f"nbos_{name}", text, labels, registry=self.registry)
        return _Series(metric) if labels else metric

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Any:
        metric = Histogram(f"nbos_{name}", text, labels, buckets=buckets, registry=self.registry)
        return _Series(metric) if labels else metric

    def _whose(self, grant: GrantRecord) -> tuple[str, ...]:
        kind = "device" if grant.shares and grant.shares[0].whole else "slice"
        return (kind, grant.owner) if self.owners else (kind,)

    # -- bids and grants ----------------------------------------------------------------------------------------------

    def bid(self, answer: str, seconds: float) -> None:
        """answer: `lead`, or the code of the yield. seconds: without the wait for room."""
        self._bids[(answer,)].inc()
        self._bid_time.observe(seconds)

    def granted(self, grant: GrantRecord, waited: float) -> None:
        whose = self._whose(grant)
        self._grants[whose].inc()
        self._waited[whose].observe(waited)

    def touched(self) -> None:
        self._touched.inc()

    def clocks_switched(self) -> None:
        self._clocks.inc()

    def given_back(self, grant: GrantRecord, held: float) -> None:
        self._held[self._whose(grant)].observe(held)

    def gave_back(self, tier: str, size: int, seconds: float) -> None:
        """What a cell had left on a device was moved away for somebody else."""
        self._back[(tier,)].inc(size)
        self._back_time[(tier,)].observe(seconds)

    def recalled(self, tpcs: int) -> None:
        self._recalls.inc()
        self._recalled.inc(tpcs)

    def returned(self, seconds: float) -> None:
        self._give_back.observe(seconds)

    # -- the log, blobs -----------------------------------------------------------------------------------------------

    def refused(self, code: str) -> None:
        """code: one of the protocol's, never what a replica said."""
        self._refusals[(code,)].inc()

    def appended(self, seconds: float) -> None:
        self._appends.observe(seconds)

    def abandoned(self) -> None:
        self._abandoned.inc()

    def blob(self, operation: str, seconds: float, size: int) -> None:
        """operation: put or get."""
        self._blob_time[(operation,)].observe(seconds)
        self._blob_bytes[(operation,)].inc(size)

    def blob_failed(self, operation: str) -> None:
        self._blob_failures[(operation,)].inc()

    # -- replicas -----------------------------------------------------------------------------------------------------

    def started(self, again: bool) -> None:
        """again: in the place of a process that ended."""
        self._starts.inc()
        if again:
            self._restarts.inc()

    def ended(self, by: str) -> None:
        """by: `daemon` (it was told to, or killed for its memory) or `itself`."""
        self._ends[(by,)].inc()

    # -- etcd ---------------------------------------------------------------------------------------------------------

    def etcd_answered(self, seconds: float) -> None:
        self._etcd.observe(seconds)

    def etcd_failed(self) -> None:
        self._etcd_failures.inc()

    def etcd_was_away(self, seconds: float) -> None:
        self._etcd_away.inc(max(0.0, seconds))

    def lease_lost(self) -> None:
        self._leases.inc()
