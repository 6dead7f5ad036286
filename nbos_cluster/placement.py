"""Which host gets which replica of a kernel. Pure functions of what is known; no clock, no IO.

Guarantees: a host that drains or is full gets nothing new; a replica that stands on a usable host never
moves; replicas of one kernel stand on different hosts wherever there are enough; among equals the host least
subscribed is taken, so the same input always gives the same plan. A host is over-subscribed on purpose (GPUs
are bound per execution, as in NotebookOS): what counts is the GPUs its replicas may ask for in relation to
what it has.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .gpumodel import is_model
from .records import HostRecord, KernelSpec, Resources


class NoRoom(LookupError):
    """The replicas cannot be placed; says what is missing. lasting: no wait would help, hosts must be
    added."""

    def __init__(self, message: str, *, lasting: bool) -> None:
        super().__init__(message)
        self.lasting = lasting


@dataclass(slots=True)
class HostLoad:
    """A living host and what stands on it. subscribed: GPUs (slices count as parts) that its replicas ask
    for."""

    record: HostRecord
    replicas: int = 0
    subscribed: float = 0.0
    kernels: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def full(self) -> bool:
        return self.replicas >= self.record.max_replicas

    def ratio(self) -> float:
        """GPUs asked for by one GPU that is there; a host without GPUs is never short of them."""
        healthy = sum(1 for device in self.record.devices if device.healthy)
        return self.subscribed / healthy if healthy else 0.0


def loads(hosts: Iterable[HostRecord], specs: Iterable[KernelSpec]) -> dict[str, HostLoad]:
    """The load of each living host, counted from what every kernel's spec gives it."""
    found = {record.name: HostLoad(record) for record in hosts}
    for spec in specs:
        for host in spec.placement.values():
            if host in found:
                _subscribe(found[host], spec.kernel, spec.resources)
    return found


def unfit(host: HostRecord, needs: Resources) -> str:
    """Why `host` could never run an execution that asks for `needs`; empty when it could."""
    if not needs.wants_gpu:
        return ""
    well = [d for d in host.devices if (d.healthy or d.passing) and not (d.parent and needs.gpus > 1)]
    right = [d for d in well if is_model(d.model, needs.model)]
    model = f" {needs.model}" if needs.model else ""
    if len(right) < max(1, needs.gpus):
        has = f" (it has {', '.join(sorted({d.model for d in well}))})" if model and well else ""
        return f"host {host.name} has {len(right)} healthy{model} GPUs of the {max(1, needs.gpus)} asked for{has}"
    if sum(d.tpcs >= needs.tpcs for d in right) < max(1, needs.gpus):
        most = max(d.tpcs for d in right)
        return f"host {host.name}'s largest{model} GPU has {most} TPCs, {needs.tpcs} are asked for"
    if sum(d.memory >= needs.memory for d in right) < max(1, needs.gpus):
        most = max(d.memory for d in right)
        return f"host {host.name}'s largest{model} GPU has {most} bytes, {needs.memory} are asked for"
    return ""


def place(spec: KernelSpec, hosts: Mapping[str, HostLoad], existing: Mapping[str, str] | None = None) -> dict[str, str]:
    """Host name by replica index, as `KernelSpec.placement` holds it; new ones get the lowest that are free.

    existing: replicas that stand already; those on hosts that still live stay where they are. While a replica moves
    there is one more than `spec.replicas`. Raises NoRoom. `hosts` is not changed.
    """
    plan = {i: host for i, host in (existing or {}).items() if host in hosts}
    wanted = spec.replicas + (spec.move is not None)
    state = {name: _copy(load, spec.kernel) for name, load in hosts.items()}
    for host in plan.values():
        _subscribe(state[host], spec.kernel, spec.resources)
    for index in (str(i) for i in range(wanted + len(plan))):
        if len(plan) < wanted and index not in plan:
            chosen = _choose(spec, state, list(plan.values()))
            plan[index] = chosen.name
            _subscribe(chosen, spec.kernel, spec.resources)
    return dict(sorted(plan.items(), key=lambda item: int(item[0])))


def replace_lost(spec: KernelSpec, hosts: Mapping[str, HostLoad]) -> dict[str, str] | None:
    """A new placement when replicas stand on hosts that are not in `hosts` (lost), or are missing; None when all is
    well.

    A replica that moves is left to its move (`moving.decide`). Raises NoRoom as `place` does. `hosts` counts this
    kernel's replicas, as `loads` gives it.
    """
    moves = {str(spec.move.source), str(spec.move.target)} if spec.move is not None else set()
    lost = {i for i, host in spec.placement.items() if host not in hosts}
    if lost & moves or (not lost and len(spec.placement) >= spec.replicas + (spec.move is not None)):
        return None
    return place(spec, _without(hosts, spec), {i: h for i, h in spec.placement.items() if i not in lost})


def choose_target(spec: KernelSpec, hosts: Mapping[str, HostLoad], source: str, avoid: Container[str] = ()) -> str:
    """The host to which the replica with index `source` should move: none of the kernel's own hosts while there are
    others.

    avoid: hosts where it failed lately. Raises NoRoom.
    """
    left = spec.placement[source]
    state = {name: load for name, load in hosts.items() if name != left and name not in avoid}
    taken = [host for i, host in spec.placement.items() if i != source]
    return _choose(spec, state, taken).name


def busiest(spec: KernelSpec, hosts: Mapping[str, HostLoad]) -> str:
    """Index of the replica whose host is the most loaded: the one to move when nobody says which."""

    def load(index: str) -> tuple[int, float, float, int]:
        there = hosts.get(spec.placement[index])
        crowded = list(spec.placement.values()).count(spec.placement[index])
        return (crowded, there.ratio(), there.replicas / max(1, there.record.max_replicas), int(index)) if there else (
            0, 0.0, 0.0, int(index))  # fmt: skip

    return max(spec.placement, key=load)


@dataclass(frozen=True, slots=True)
class ServerHost:
    """A living host as a place for users' Jupyter Servers. replicas: that are placed on it; servers: that run on it."""

    name: str
    draining: bool = False
    cpus: int = 1
    replicas: int = 0
    servers: int = 0


def place_server(hosts: Iterable[ServerHost], avoid: Container[str] = ()) -> str:
    """The least loaded host: the one with the fewest replicas and servers for a CPU. Raises NoRoom."""
    known = list(hosts)
    open_hosts = [host for host in known if not host.draining and host.name not in avoid]
    if not open_hosts:
        why = [f"{host.name} {'drains' if host.draining else 'does not answer'}" for host in known]
        reasons = "; ".join(sorted(why)[:8]) or "none of those that may has reported; start their gpu_daemon"
        raise NoRoom(f"no host can take the server: {reasons}", lasting=False)
    return min(open_hosts, key=lambda h: ((h.replicas + h.servers) / max(1, h.cpus), h.servers, h.name)).name


def spread(placement: Mapping[str, str]) -> int:
    """How many different hosts the replicas stand on."""
    return len(set(placement.values()))


def _choose(spec: KernelSpec, state: Mapping[str, HostLoad], taken: Sequence[str]) -> HostLoad:
    open_hosts = [load for load in state.values() if not load.record.draining and not load.full]
    if not open_hosts:
        raise NoRoom(_why_none(spec, state), lasting=not state)
    # A host that could never run what the kernel asks for is still good for a standby, once one can.
    fit = [load for load in open_hosts if not unfit(load.record, spec.resources)]
    if not fit and not any(h in state and not unfit(state[h].record, spec.resources) for h in taken):
        reasons = "; ".join(unfit(load.record, spec.resources) for load in open_hosts[:5])
        raise NoRoom(f"no host can run what kernel {spec.kernel} asks for: {reasons}", lasting=True)
    return min(open_hosts, key=lambda load: _cost(load, spec, taken))


def _cost(load: HostLoad, spec: KernelSpec, taken: Sequence[str]) -> tuple[int, bool, float, float, str]:
    share = load.replicas / max(1, load.record.max_replicas)
    cannot = bool(unfit(load.record, spec.resources))
    first = not taken
    # The first replica must be able to lead; for the others a host of their own counts more.
    return (int(cannot) if first else taken.count(load.name), cannot, load.ratio(), share, load.name)


def _why_none(spec: KernelSpec, state: Mapping[str, HostLoad]) -> str:
    if not state:
        return f"kernel {spec.kernel} cannot be placed: no host has reported; start a gpu_daemon"
    reasons = [
        f"{load.name} drains"
        if load.record.draining
        else f"{load.name} holds {load.replicas} of at most {load.record.max_replicas} replicas"
        for load in state.values()
    ]
    return f"kernel {spec.kernel} cannot be placed: " + "; ".join(sorted(reasons)[:8])


def _subscribe(load: HostLoad, kernel: str, needs: Resources) -> None:
    load.replicas += 1
    load.kernels.add(kernel)
    tpcs = max((device.tpcs for device in load.record.devices), default=0)
    load.subscribed += needs.gpus + (needs.tpcs / tpcs if tpcs and not needs.gpus else 0.0)


def _copy(load: HostLoad, kernel: str) -> HostLoad:
    return HostLoad(load.record, load.replicas, load.subscribed, load.kernels - {kernel})


def _without(hosts: Mapping[str, HostLoad], spec: KernelSpec) -> dict[str, HostLoad]:
    """The loads as if this kernel stood nowhere; `place` counts what stays once more."""
    found = {name: _copy(load, spec.kernel) for name, load in hosts.items()}
    for host in spec.placement.values():
        if host in found:
            empty = HostLoad(found[host].record)
            _subscribe(empty, spec.kernel, spec.resources)
            found[host].replicas -= 1
            found[host].subscribed -= empty.subscribed
    return found
