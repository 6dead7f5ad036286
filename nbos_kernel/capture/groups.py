"""Variables that share an object form one group: only together in one pickle do they still share it afterwards.

Identities are compared in bulk; only those that two pickles have in common are looked at one by one. Variables that
share nothing stand alone, unless there are very many of them (`buckets`).
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Container, Sequence
from typing import Protocol


class Reaching(Protocol):
    """What a pickle refers to: `memo` by identity; `shares(i)`: whether it matters that i is one object."""

    @property
    def memo(self) -> dict[int, tuple[int, object]]: ...

    def shares(self, identity: int) -> bool: ...


def groups(reached: Sequence[Reaching], kept: Container[int] = ()) -> list[list[int]]:
    """Positions of `reached` in groups, each in order, in the order of first appearance. `kept`: identities of what
    libraries keep one of and never change, which ties nothing."""
    parent = list(range(len(reached)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    if len(reached) > 1:
        owner: dict[int, int] = {}
        for number, pickled in enumerate(reached):
            reaches = pickled.memo.keys()
            common = reaches & owner.keys()
            for identity in common:
                if root(owner[identity]) != root(number) and pickled.shares(identity) and identity not in kept:
                    parent[root(number)] = root(owner[identity])
            owner.update(dict.fromkeys(reaches - common if common else reaches, number))
    members: dict[int, list[int]] = {}
    for number in range(len(reached)):
        members.setdefault(root(number), []).append(number)
    return list(members.values())


BUCKET = 256
"""Names in one bucket, about."""


def buckets(singles: Collection[str], alone: int) -> list[tuple[str, ...]]:
    """Each name by itself up to `alone` names; beyond, in buckets that depend on the names and nothing else."""
    if len(singles) <= alone:
        return [(name,) for name in singles]
    count = 1 << (len(singles) // BUCKET).bit_length()
    found: dict[int, list[str]] = {}
    for name in singles:
        found.setdefault(zlib.crc32(name.encode()) % count, []).append(name)
    return [tuple(sorted(names)) for names in found.values()]
