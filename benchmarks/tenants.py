"""Tenants for `benchmarks/sharing.py`: who computes what when, on the simulated device. Seeded, no clock.

An important tenant whose cells arrive at random (a Poisson process), each some kernels that fill 40 TPCs, as a small
language model's decoding does; and a steady background one that trains, in steps of kernels that spread over all TPCs.
The numbers are ours; they stay within the facts: background kernels take no longer than an atom (500 µs) on the whole
device.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

from nbos_cluster.simdevice import Device, Kernel
from nbos_cluster.simdevice.parameters import ATOM, HOPPER_TPCS

IMPORTANT, BACKGROUND = "important", "background"

DECODE = Kernel(m=0.0024 * 40, b=0.0001, width=40)
"""2.5 ms on 40 TPCs or more."""
CELL = 10
"""Kernels of an important cell: 25 ms alone."""
QUOTA = 40
"""TPCs guaranteed to the important tenant: what its kernels fill, as right-sizing finds. The others are the
background's."""
LOAD = 0.4
"""Part of the time that the important tenant computes when it is alone."""

TRAIN = Kernel(m=0.9 * ATOM * HOPPER_TPCS, b=0.1 * ATOM)
"""An atom's 500 µs on the whole device."""
STEP = 40
"""Kernels of a training step: 20 ms on the whole device."""
AHEAD = 2
"""Kernels that the background has launched and that are not over: what cannot be called back."""


def arrivals(seconds: float, seed: int) -> list[float]:
    """When important cells arrive."""
    random, rate, at, out = Random(seed), LOAD / (CELL * DECODE.seconds(HOPPER_TPCS)), 0.0, []
    while (at := at + random.expovariate(rate)) < seconds:
        out.append(at)
    return out


@dataclass
class Important:
    """Its cells run one after the other, in order of arrival."""

    waiting: deque[float] = field(default_factory=deque)
    began: float | None = None
    """Arrival of the cell that runs."""
    left: int = 0
    started: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """From arrival to end."""
    own: list[float] = field(default_factory=list)
    """From when the cell before it was over."""

    def arrive(self, device: Device, at: float) -> None:
        self.waiting.append(at)

    def next_cell(self, device: Device) -> None:
        """Launch the kernels of the next cell."""
        self.began, self.left, self.started = self.waiting.popleft(), CELL, device.now
        for _ in range(CELL):
            device.launch(IMPORTANT, DECODE)

    def done(self, at: float) -> bool:
        """One kernel is over; whether the cell is."""
        self.left -= 1
        if self.left == 0 and self.began is not None:
            self.latencies.append(at - self.began)
            self.own.append(at - self.started)
            self.began = None
            return True
        return False


@dataclass
class Background:
    """Training that never ends: as long as it is not paused, AHEAD kernels are launched."""

    done: int = 0
    launched: int = 0
    paused: bool = False

    def launch(self, device: Device) -> None:
        while not self.paused and self.launched - self.done < AHEAD:
            device.launch(BACKGROUND, TRAIN, self.launched)
            self.launched += 1

    @property
    def at_step(self) -> bool:
        """Whether the next kernel is the first of a step."""
        return self.launched % STEP == 0
