"""Which groups of a split make up a slice. Pure.

A split gives groups of SMs in the driver's order: one TPC each where the driver can, larger ones on older chips, and a
remainder of another size at the end. TPC k of a grant is the k-th pair of SMs in that order, in every process alike.

Guarantee: slices of disjoint TPC numbers get disjoint groups, since a group belongs to a slice only with all its TPCs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .errors import CudaTrouble

SMS_PER_TPC = 2


def tpcs_of(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The TPC numbers of each group. sizes: SMs of each group, in the driver's order."""
    numbered, first = [], 0
    for size in sizes:
        after = first + size // SMS_PER_TPC
        numbered.append(tuple(range(first, after)))
        first = after
    return numbered


def choose(sizes: Sequence[int], tpcs: Collection[int]) -> list[int]:
    """The groups (by position) that lie within the TPCs `tpcs`. Raises CudaTrouble when there is none, or when `tpcs`
    names one that this split does not have."""
    numbered, wanted = tpcs_of(sizes), set(tpcs)
    total = sum(len(numbers) for numbers in numbered)
    if not wanted:
        raise CudaTrouble("the grant names no TPC of the device; ask for a slice with tpcs=N")
    if max(wanted) >= total:
        raise CudaTrouble(
            f"the grant names TPC {max(wanted)}, this process sees {total} TPCs of the device (0 to {total - 1}); an "
            "MPS limit on active threads must be unset (or 100) for slices"
        )
    inside = [i for i, numbers in enumerate(numbered) if numbers and wanted.issuperset(numbers)]
    if not inside:
        grain = max(len(numbers) for numbers in numbered)
        raise CudaTrouble(
            f"the driver hands out this device's TPCs {grain} at a time, and the grant of {len(wanted)} holds no such "
            f"group whole; ask for at least {2 * grain - 1} TPCs"
        )
    return inside
