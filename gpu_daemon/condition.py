"""Whether each GPU may be granted: what was seen and heard of it goes in, verdicts come out. No IO, no clock.

Guarantees: a device is open exactly while nothing speaks against it; each change is told once, with the reason. How it
comes back depends on what closed it:

- what is *measured* (lost, memory errors, failed row remapping, a reset that the driver wants, heat, a driver that does
  not answer) ends by itself, once the device was seen well in `steady` looks one after the other: NVML shows those only
  for as long as they hold, and a reset, which only an admin can do, is what ends the lasting ones.
- a critical XID is *told* once and never taken back by the driver: it holds until an admin says so, or the machine was
  started anew (the caller then brings nothing saved).
- what an admin closed, an admin opens.

Heat and silence pass without anybody's doing: cells wait for such a device instead of being refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gpu_daemon import xids

RESET = "an admin must reset it or restart the machine"


@dataclass(frozen=True)
class Policy:
    """ecc_limit: uncorrected memory errors since the last reset that are borne. steady: looks without a complaint after
    which a device is open again. cool_by: °C below the limit where heat ends. harmless: XIDs not to close for."""

    ecc_limit: int = 0
    steady: int = 2
    cool_by: int = 5
    harmless: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Sample:
    """What one look found of one GPU. None: not told. lost: NVML's words when it did not answer. limit: °C from which
    the hardware slows it down. slowed: it does so now. action: what the driver wants done, '' for nothing."""

    lost: str = ""
    ecc: int | None = None
    remap_failed: bool = False
    temperature: int | None = None
    limit: int | None = None
    slowed: bool = False
    action: str = ""


@dataclass(frozen=True)
class Looked:
    """All GPUs were looked at. gone: NVML as a whole did not answer (its words), then `samples` counts for nothing."""

    samples: Mapping[str, Sample]
    gone: str = ""


@dataclass(frozen=True)
class Heard:
    """The driver told of an XID on a GPU."""

    uuid: str
    xid: int


@dataclass(frozen=True)
class Closed:
    """An admin takes these devices out of use, with the reason for each, and no others."""

    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Reopened:
    """An admin says that the device may be used again: XIDs of before count no more."""

    uuid: str


Event = Looked | Heard | Closed | Reopened


@dataclass(frozen=True)
class Verdict:
    """reason: why no new cell may get the GPU, '' when it may. passing: expected to end by itself."""

    uuid: str
    reason: str = ""
    passing: bool = False


@dataclass
class _State:
    measured: str = ""
    passing: bool = False
    hot: bool = False
    well: int = 0
    """Looks without a complaint since the last one with one."""
    xids: dict[int, None] = field(default_factory=dict)
    closed: str = ""
    told: Verdict | None = None


class Conditions:
    """Of one host's GPUs. xids: critical ones heard before the daemon was restarted."""

    def __init__(
        self,
        uuids: Iterable[str],
        policy: Policy | None = None,
        heard: Mapping[str, Iterable[int]] | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self._states = {uuid: _State(told=Verdict(uuid)) for uuid in uuids}
        for uuid, numbers in (heard or {}).items():
            if uuid in self._states:
                self._states[uuid].xids.update(dict.fromkeys(numbers))

    def handle(self, event: Event) -> list[Verdict]:
        """What has changed. Events about devices that are not here change nothing."""
        match event:
            case Looked(samples, gone):
                for uuid, state in self._states.items():
                    if gone or uuid in samples:
                        self._measure(state, samples.get(uuid, Sample()), gone)
            case Heard(uuid, xid):
                if uuid in self._states and xids.meaning(xid, self.policy.harmless) == "critical":
                    self._states[uuid].xids[xid] = None
            case Closed(reasons):
                for uuid, state in self._states.items():
                    state.closed = reasons.get(uuid, "")
            case Reopened(uuid):
                if uuid in self._states:
                    self._states[uuid].xids.clear()
        return self._news()

    def verdicts(self) -> list[Verdict]:
        """How all devices stand."""
        return [self._verdict(uuid, state) for uuid, state in self._states.items()]

    def heard(self) -> dict[str, list[int]]:
        """The critical XIDs that hold, to be brought again after a restart of the daemon."""
        return {uuid: list(state.xids) for uuid, state in self._states.items() if state.xids}

    def _news(self) -> list[Verdict]:
        news = [verdict for verdict in self.verdicts() if self._states[verdict.uuid].told != verdict]
        for verdict in news:
            self._states[verdict.uuid].told = verdict
        return news

    def _verdict(self, uuid: str, state: _State) -> Verdict:
        reasons = [xids.words(xid) for xid in state.xids]
        if reasons:
            reasons[-1] += f"; {RESET}, then say so (nbos drain --gpu … --undo)"
        if state.measured:
            reasons.append(state.measured)
        if state.closed:
            reasons.append(state.closed)
        return Verdict(uuid, "; ".join(reasons), state.passing and not state.xids and not state.closed)

    def _measure(self, state: _State, sample: Sample, gone: str) -> None:
        reason, passing = self._complaint(state, sample, gone)
        if reason:
            state.measured, state.passing, state.well = reason, passing, 0
            return
        state.well += 1
        if state.measured and state.well >= self.policy.steady:
            state.measured, state.passing = "", False

    def _complaint(self, state: _State, sample: Sample, gone: str) -> tuple[str, bool]:
        """What is wrong, worst first, and whether it passes by itself."""
        if gone:
            return f"NVML does not work: {gone}; look at the NVIDIA driver", True
        if sample.lost:
            return f"the device is lost ({sample.lost}); {RESET}", False
        if sample.remap_failed:
            return "a row of its memory could not be replaced; have the device replaced", False
        if sample.ecc is not None and sample.ecc > self.policy.ecc_limit:
            bound = f" (borne: {self.policy.ecc_limit})" if self.policy.ecc_limit else ""
            return f"{sample.ecc} uncorrected memory errors since its last reset{bound}; {RESET}", False
        if sample.action:
            return f"the driver wants {sample.action}", False
        state.hot = self._is_hot(state.hot, sample)
        if state.hot:
            limit = f", it slows down at {sample.limit} °C" if sample.limit is not None else ""
            return f"too hot ({_degrees(sample.temperature)}{limit}); it is used again when it has cooled", True
        return "", False

    def _is_hot(self, was: bool, sample: Sample) -> bool:
        """The hardware slows it down for heat, or it is where that begins; over only when clearly below."""
        if sample.slowed:
            return True
        if sample.temperature is None or sample.limit is None:
            return False
        return sample.temperature >= sample.limit - (self.policy.cool_by if was else 0)


def _degrees(temperature: int | None) -> str:
    return "its temperature is not told" if temperature is None else f"{temperature} °C"
