"""The played device as a discrete-event machine, without clock or IO: the caller brings the time with every call.

Each client has one stream: its kernels and copies run one after the other, in order; different clients' run at the
same time, as `Sharing` says. `advance(to)` carries out everything up to a time and returns what ended. Guarantees:
every launch and copy gets exactly one `Done` or `Failed`; no TPC is held by two kernels; memory in use never exceeds
a client's budget or the device's.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from .cost import Kernel
from .parameters import HOPPER_TPCS, PCIE5_BANDWIDTH
from .sharing import Running, Sharing, Slices

GIB = 1 << 30


class DeviceFault(RuntimeError):
    """The device, or this client's context on it, is broken; says why."""


class OutOfMemory(RuntimeError):
    """Says what was asked, what is free and of how much."""


@dataclass(frozen=True)
class Done:
    client: str
    tag: object
    at: float


@dataclass(frozen=True)
class Failed:
    client: str
    tag: object
    at: float
    reason: str


Outcome = Done | Failed


@dataclass
class _Job:
    """What stands in a stream: a kernel, or a copy of `size` bytes. left: the part still to do, as of `since`."""

    tag: object
    kernel: Kernel | None
    allowed: frozenset[int] = frozenset()
    size: float = 0.0
    left: float = 1.0
    since: float = 0.0
    tpcs: float = 0.0
    ends: float = math.inf


@dataclass
class _Client:
    slice: frozenset[int]
    budget: int
    used: int = 0
    stream: deque[_Job] = field(default_factory=deque)
    broken: str = ""
    busy: float = 0.0
    work: float = 0.0


class Device:
    """`tpcs` TPCs, `memory` bytes, copies at `bandwidth` bytes a second for all together; `clock`: a part of the
    highest, which kernels feel as their sensitivity says, and copies do not."""

    def __init__(
        self,
        tpcs: int = HOPPER_TPCS,
        memory: int = 80 * GIB,
        sharing: Sharing | None = None,
        bandwidth: float = PCIE5_BANDWIDTH,
        clock: float = 1.0,
    ) -> None:
        if not 0 < clock <= 1:
            raise ValueError(f"a clock is a part of the highest, more than 0 and at most 1, not {clock}")
        self.clock = clock
        self.tpcs, self.memory, self.bandwidth = tpcs, memory, bandwidth
        self.sharing: Sharing = sharing or Slices()
        self.now = 0.0
        self.lost = ""
        """Why the device does not answer any more, '' while it does."""
        self._clients: dict[str, _Client] = {}
        self._running: dict[str, Running] = {}
        self._failed: list[Failed] = []

    # -- clients ------------------------------------------------------------------------------------------------------

    def open(self, client: str, tpcs: frozenset[int] | None = None, memory: int = 0, used: int = 0) -> None:
        """A process begins to use the device. memory: its budget in bytes, 0: all. used: what it has there from before,
        perhaps more than its budget now."""
        if client in self._clients:
            raise ValueError(f"client {client!r} is open already")
        budget = min(memory, self.memory) if memory else self.memory
        self._clients[client] = _Client(self._checked(tpcs), budget, used)

    def close(self, client: str) -> None:
        """The process ends: what it had in its stream fails, its memory is free."""
        self._break(client, "its process ended")
        del self._clients[client]
        self._share()

    def confine(self, client: str, tpcs: frozenset[int]) -> None:
        """Move the client to another slice, as by choosing another stream: what it launched before stays on the old."""
        self._clients[client].slice = self._checked(tpcs)

    def holds(self, client: str) -> frozenset[int]:
        """TPCs that the client's running kernel occupies (with Slices)."""
        run = self._running.get(client)
        return run.held if run is not None else frozenset()

    def pending(self, client: str) -> int:
        """Kernels and copies in the client's stream, the running one included."""
        return len(self._clients[client].stream)

    # -- work ---------------------------------------------------------------------------------------------------------

    def launch(self, client: str, kernel: Kernel, tag: object = None) -> None:
        """Raises DeviceFault."""
        self._enqueue(client, _Job(tag, kernel, self._clients[client].slice))

    def copy(self, client: str, size: int, tag: object = None) -> None:
        """Between host and device, `size` bytes. Raises DeviceFault."""
        if size <= 0:
            raise ValueError(f"a copy moves at least one byte, not {size}")
        self._enqueue(client, _Job(tag, None, size=float(size)))

    def allocate(self, client: str, size: int) -> None:
        """Raises OutOfMemory or DeviceFault."""
        state = self._sound(client)
        free = min(state.budget - state.used, self.memory - sum(c.used for c in self._clients.values()))
        if not 0 < size <= free:
            raise OutOfMemory(
                f"{client} asks for {size / GIB:.2f} GiB of device memory, {max(free, 0) / GIB:.2f} GiB of its "
                f"{state.budget / GIB:.2f} GiB are free; free some, or ask for more memory with the cell"
            )
        state.used += size

    def free(self, client: str, size: int) -> None:
        state = self._clients[client]
        if not 0 < size <= state.used:
            raise ValueError(f"{client} has {state.used} bytes and cannot free {size}")
        state.used -= size

    def used(self, client: str) -> int:
        return self._clients[client].used

    # -- faults -------------------------------------------------------------------------------------------------------

    def fault(self, reason: str, client: str = "") -> None:
        """Break one client's context (an illegal access), or the whole device (it fell off the bus)."""
        for name in [client] if client else list(self._clients):
            self._break(name, reason)
        if not client:
            self.lost = reason
        self._share()

    def repair(self) -> None:
        """The device was reset: it works for clients that open it from now on."""
        self.lost = ""

    # -- time ---------------------------------------------------------------------------------------------------------

    def next_at(self) -> float:
        """When the next thing happens by itself; infinite where nothing does."""
        if self._failed:
            return self.now
        ends = min((state.stream[0].ends for state in self._clients.values() if state.stream), default=math.inf)
        return min(ends, self.sharing.changes_at(self.now)) if self._running else ends

    def advance(self, to: float) -> list[Outcome]:
        """Let time pass until `to`; what ended, in order of time."""
        if to < self.now:
            raise ValueError(f"time goes on: {to} is before {self.now}")
        out: list[Outcome] = [*self._failed]
        self._failed.clear()
        while (at := self.next_at()) <= to:
            self._settle(at)
            for name, state in self._clients.items():
                if state.stream and state.stream[0].ends <= at:
                    out.append(Done(name, state.stream.popleft().tag, at))
                    self._running.pop(name, None)
                    self._begin(name)
            self._share()
        self._settle(to)
        return out

    def use(self, client: str) -> tuple[float, float]:
        """TPC-seconds that the client's kernels occupied, and those of them that were work (its kernels' m)."""
        state = self._clients[client]
        return state.busy, state.work

    # -- inside -------------------------------------------------------------------------------------------------------

    def _checked(self, tpcs: frozenset[int] | None) -> frozenset[int]:
        every = frozenset(range(self.tpcs))
        if tpcs is not None and not tpcs <= every:
            raise ValueError(f"TPCs {sorted(tpcs - every)} are not on a device of {self.tpcs}")
        return every if tpcs is None else tpcs

    def _sound(self, client: str) -> _Client:
        state = self._clients[client]
        if self.lost or state.broken:
            raise DeviceFault(f"simulated device: {self.lost or state.broken}")
        return state

    def _enqueue(self, client: str, job: _Job) -> None:
        state = self._sound(client)
        state.stream.append(job)
        if len(state.stream) == 1:
            self._begin(client)
            self._share()

    def _begin(self, client: str) -> None:
        """What is first in the client's stream starts."""
        state = self._clients[client]
        if not state.stream:
            return
        job = state.stream[0]
        job.since = self.now
        if job.kernel is not None:
            self._running[client] = Running(job.kernel, job.allowed)

    def _break(self, client: str, reason: str) -> None:
        state = self._clients[client]
        state.broken, state.used = reason, 0
        self._failed += [Failed(client, job.tag, self.now, reason) for job in state.stream]
        state.stream.clear()
        self._running.pop(client, None)

    def _settle(self, at: float) -> None:
        """Account for the time until `at`, in which nothing changed."""
        for state in self._clients.values():
            if not state.stream or at <= self.now:
                continue
            job, passed = state.stream[0], at - self.now
            if job.kernel is None or not job.tpcs:
                continue
            state.busy += passed * job.tpcs
            state.work += passed * job.kernel.m / job.kernel.seconds(job.tpcs, self.clock)
        self.now = max(self.now, at)

    def _share(self) -> None:
        """Say anew how fast everything goes from now on."""
        shares = self.sharing.shares(self._running, self.tpcs, self.now)
        copies = [c.stream[0] for c in self._clients.values() if c.stream and c.stream[0].kernel is None]
        for name, state in self._clients.items():
            if state.stream:
                self._set_speed(state.stream[0], shares.get(name, 0.0), len(copies))

    def _set_speed(self, job: _Job, tpcs: float, copies: int) -> None:
        if math.isfinite(job.ends) and job.ends > job.since:
            job.left *= max(0.0, (job.ends - self.now) / (job.ends - job.since))
        whole = job.size * copies / self.bandwidth if job.kernel is None else job.kernel.seconds(tpcs, self.clock)
        job.since, job.tpcs = self.now, tpcs
        job.ends = self.now + job.left * whole if job.left > 0 else self.now
