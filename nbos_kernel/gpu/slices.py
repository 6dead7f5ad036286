"""The slices of one device in this process: green contexts made from one split, a stream each.

Guarantees: the device is split once, so that slices of disjoint TPCs have disjoint SMs, here and in other processes
that split it the same way; a slice once made stays for the process's life, since tensors and torch's allocator go on
knowing its stream.

The allocator keeps a pool of memory for every stream: so at most `STREAMS` slices are made while a grant can be served
with one that lies within it. That one is smaller, never larger.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .driver import Driver
from .groups import SMS_PER_TPC, choose, tpcs_of

STREAMS = 5


@dataclass(frozen=True)
class Slice:
    """tpcs: the TPC numbers whose SMs `stream` runs on. sms: as the driver counts them."""

    tpcs: frozenset[int]
    sms: int
    context: int
    stream: int


class Slices:
    """`ordinal`: the device, as this process counts. Raises CudaTrouble when it cannot be split."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self._driver = driver
        self._device = driver.device(ordinal)
        self._groups = driver.split(driver.device_sms(self._device), SMS_PER_TPC)
        self._sizes = [group.sm_count for group in self._groups]
        self._made: dict[tuple[int, ...], Slice] = {}

    @property
    def tpcs(self) -> int:
        """TPCs of the device that this process sees."""
        return sum(self._sizes) // SMS_PER_TPC

    def get(self, tpcs: Collection[int]) -> Slice:
        """The slice of these TPC numbers, or the largest one within them. Raises CudaTrouble."""
        chosen = tuple(choose(self._sizes, tpcs))
        if chosen not in self._made and len(self._made) >= STREAMS:
            within = [made for groups, made in self._made.items() if set(groups) <= set(chosen)]
            # Half of what was granted is worth less than one more pool of memory.
            best = max(within, key=lambda made: made.sms, default=None)
            if best is not None and 2 * len(best.tpcs) >= len(set(tpcs)):
                return best
        if chosen not in self._made:
            self._made[chosen] = self._make(chosen)
        return self._made[chosen]

    def _make(self, chosen: tuple[int, ...]) -> Slice:
        driver, numbers = self._driver, tpcs_of(self._sizes)
        context = driver.green_context(self._device, [self._groups[i] for i in chosen])
        try:
            stream, sms = driver.green_stream(context), driver.green_sms(context)
        except BaseException:
            driver.destroy_green_context(context)
            raise
        return Slice(frozenset(tpc for i in chosen for tpc in numbers[i]), sms, context, stream)
