"""Variables that share an object form one group: only together in one pickle do they still share it afterwards.

Pure data in, groups out: a union-find over the identities each variable reaches. Variables that share nothing stand
alone, unless there are very many of them (`buckets`).
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping


def groups(reached: Mapping[str, Collection[int]]) -> list[tuple[str, ...]]:
    """Names in groups (each sorted, in the order of first appearance) from the object identities each name
    reaches."""
    parent: dict[str, str] = {name: name for name in reached}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    owner: dict[int, str] = {}
    for name, identities in reached.items():
        for identity in identities:
            other = owner.setdefault(identity, name)
            if other is not name:
                parent[root(name)] = root(other)
    members: dict[str, list[str]] = {}
    for name in reached:
        members.setdefault(root(name), []).append(name)
    return [tuple(sorted(names)) for names in members.values()]


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
