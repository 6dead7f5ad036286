"""One device's accounts in the ledger: which TPCs are free, how much memory, who holds what. No IO.

TPCs stand as bits of an integer, and what is free is counted along, so that a look at a device costs a comparison: a
host has up to 64 of them and a decision takes microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbos_cluster.records import Device, DeviceShare


class Book:
    """free: a bit for each free TPC. holders: the TPCs (bits) and bytes of each grant."""

    __slots__ = ("device", "free", "free_memory", "free_tpcs", "holders", "uuid")

    def __init__(self, device: Device) -> None:
        self.device, self.uuid = device, device.uuid
        self.free = (1 << device.tpcs) - 1
        self.free_tpcs = device.tpcs
        self.free_memory = device.memory
        self.holders: dict[str, tuple[int, int]] = {}

    @property
    def idle(self) -> bool:
        return not self.holders

    @property
    def used_tpcs(self) -> int:
        return self.device.tpcs - self.free_tpcs

    def copy(self) -> Book:
        twin = Book(self.device)
        twin.free, twin.free_tpcs, twin.free_memory = self.free, self.free_tpcs, self.free_memory
        twin.holders = dict(self.holders)
        return twin

    def has_room_for(self, share: DeviceShare) -> bool:
        """Whether exactly this share can be entered."""
        bits = bits_of(share.tpcs)
        return bits & ~self.free == 0 and share.memory <= self.free_memory

    def enter(self, grant: str, share: DeviceShare) -> None:
        bits = bits_of(share.tpcs)
        self.holders[grant] = (bits, share.memory)
        self.free &= ~bits
        self.free_tpcs -= len(share.tpcs)
        self.free_memory -= share.memory

    def leave(self, grant: str, share: DeviceShare) -> bool:
        """False when the grant did not hold exactly this share."""
        held = self.holders.pop(grant, None)
        if held is None or held != (bits_of(share.tpcs), share.memory):
            return False
        self.free |= held[0]
        self.free_tpcs += len(share.tpcs)
        self.free_memory += held[1]
        return True

    def choose(self, count: int) -> tuple[int, ...]:
        """The lowest free run of neighbours, since TPCs of one GPC share paths; scattered ones where there is no
        run. The caller knows that so many are free."""
        starts, left = self.free, count - 1
        step = 1
        while left and starts:  # a bit stays where a run begins; each turn asks for a run up to twice as long
            take = min(step, left)
            starts &= starts >> take
            left -= take
            step += take
        if starts:
            first = (starts & -starts).bit_length() - 1
            return tuple(range(first, first + count))
        return tuple(t for t in range(self.device.tpcs) if self.free >> t & 1)[:count]


def bits_of(tpcs: Sequence[int]) -> int:
    if tpcs and tpcs[-1] - tpcs[0] == len(tpcs) - 1 and len(tpcs) == len(set(tpcs)) and min(tpcs) == tpcs[0]:
        return ((1 << len(tpcs)) - 1) << tpcs[0]
    bits = 0
    for tpc in tpcs:
        bits |= 1 << tpc
    return bits
