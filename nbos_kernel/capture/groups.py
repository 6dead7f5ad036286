"""Variables that share an object form one group: only together in one pickle do they still share it afterwards.

Identities are compared in bulk; only those that two pickles have in common are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Reaching(Protocol):
    """What a pickle refers to: `memo` by identity; `shares(i)`: whether it matters that i is one object."""

    @property
    def memo(self) -> dict[int, tuple[int, object]]: ...

    def shares(self, identity: int) -> bool: ...


def groups(reached: Sequence[Reaching]) -> list[list[int]]:
    """Positions of `reached` in groups, each in order, in the order of first appearance."""
    parent = list(range(len(reached)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    if len(reached) > 1:
        owner: dict[int, int] = {}
        for number, pickled in enumerate(reached):
            memo = pickled.memo
            for identity in memo.keys() & owner.keys() if len(memo) < len(owner) else owner.keys() & memo.keys():
                if root(owner[identity]) != root(number) and pickled.shares(identity):
                    parent[root(number)] = root(owner[identity])
            for identity in memo:
                owner.setdefault(identity, number)
    members: dict[int, list[int]] = {}
    for number in range(len(reached)):
        members.setdefault(root(number), []).append(number)
    return list(members.values())
