"""One device's accounts in the ledger: which TPCs are free, how much memory, who holds what, what was left. No IO.

TPCs stand as bits of an integer, and what is free is counted along, so that a look at a device costs a comparison: a
host has up to 64 of them and a decision takes microseconds.

What a replica's process has on the device outlives its grants. It is within the grant while one is open, so a replica
takes the larger of the two: what its grants say, or what its process has.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbos_cluster.records import Device, DeviceShare

Holder = tuple[str, int]
"""A replica as the ledger knows it: its kernel and index."""


class Book:
    """free: a bit for each TPC that nobody keeps. lent: those that somebody is on nevertheless, on loan. holders: the
    TPCs (bits), bytes and replica of each grant. left: bytes that replicas' processes have here. free_memory is below 0
    when they took what they were not granted."""

    __slots__ = ("device", "free", "free_memory", "free_tpcs", "holders", "left", "lent", "uuid")

    def __init__(self, device: Device) -> None:
        self.device, self.uuid = device, device.uuid
        self.free = (1 << device.tpcs) - 1
        self.free_tpcs = device.tpcs
        self.free_memory = device.memory
        self.lent = 0
        self.holders: dict[str, tuple[int, int, Holder]] = {}
        self.left: dict[Holder, int] = {}

    @property
    def idle(self) -> bool:
        return not self.holders

    @property
    def used_tpcs(self) -> int:
        return self.device.tpcs - self.free_tpcs

    def copy(self) -> Book:
        twin = Book(self.device)
        twin.free, twin.free_tpcs, twin.free_memory = self.free, self.free_tpcs, self.free_memory
        twin.holders, twin.left, twin.lent = dict(self.holders), dict(self.left), self.lent
        return twin

    def room(self, holder: Holder) -> int:
        """Bytes that another grant of this replica can have: what is free, and what its own process has already."""
        if holder not in self.left:
            return self.free_memory
        return self.free_memory + max(0, self.left[holder] - self.granted(holder))

    def granted(self, holder: Holder) -> int:
        return sum(memory for _, memory, whose in self.holders.values() if whose == holder)

    def others_left(self, holder: Holder) -> int:
        """Bytes that the processes of other replicas have, beyond what those are granted."""
        return sum(max(0, size - self.granted(who)) for who, size in self.left.items() if who != holder)

    def has_room_for(self, share: DeviceShare, holder: Holder) -> bool:
        """Whether exactly this share can be entered."""
        bits = bits_of(share.tpcs)
        return bits & ~self.free == 0 and share.memory <= self.room(holder)

    def enter(self, grant: str, share: DeviceShare, holder: Holder) -> None:
        bits, warm = bits_of(share.tpcs), holder in self.left
        before = self._taken(holder) if warm else 0
        self.holders[grant] = (bits, share.memory, holder)
        self.free &= ~bits
        self.free_tpcs -= len(share.tpcs)
        self.free_memory -= self._taken(holder) - before if warm else share.memory

    def leave(self, grant: str, share: DeviceShare, holder: Holder) -> bool:
        """False when the grant did not hold exactly this share."""
        held, warm = self.holders.get(grant), holder in self.left
        before = self._taken(holder) if warm else 0
        if held is None or held != (bits_of(share.tpcs), share.memory, holder):
            return False
        del self.holders[grant]
        self.free |= held[0]
        self.free_tpcs += len(share.tpcs)
        self.free_memory += before - self._taken(holder) if warm else held[1]
        return True

    def set_left(self, holder: Holder, size: int) -> None:
        """The replica's process has so many bytes here now."""
        before = self._taken(holder)
        if size > 0:
            self.left[holder] = size
        else:
            self.left.pop(holder, None)
        self.free_memory -= self._taken(holder) - before

    def _taken(self, holder: Holder) -> int:
        """Bytes that count as the replica's."""
        return max(self.granted(holder), self.left.get(holder, 0))

    def choose(self, count: int) -> tuple[int, ...]:
        """The lowest free run of neighbours, since TPCs of one GPC share paths; scattered ones where there is no
        run. Those that nobody is on go first. The caller knows that so many are free."""
        idle = self.free & ~self.lent
        return self._choose(idle if self.lent and idle.bit_count() >= count else self.free, count)

    def _choose(self, free: int, count: int) -> tuple[int, ...]:
        starts, left = free, count - 1
        step = 1
        while left and starts:  # a bit stays where a run begins; each turn asks for a run up to twice as long
            take = min(step, left)
            starts &= starts >> take
            left -= take
            step += take
        if starts:
            first = (starts & -starts).bit_length() - 1
            return tuple(range(first, first + count))
        return tuple(t for t in range(self.device.tpcs) if free >> t & 1)[:count]


def bits_of(tpcs: Sequence[int]) -> int:
    if tpcs and tpcs[-1] - tpcs[0] == len(tpcs) - 1 and len(tpcs) == len(set(tpcs)) and min(tpcs) == tpcs[0]:
        return ((1 << len(tpcs)) - 1) << tpcs[0]
    bits = 0
    for tpc in tpcs:
        bits |= 1 << tpc
    return bits
