"""The address of a blob: BLAKE3 with 256 bits, in lower-case hex, of its bytes. Used by replicas and daemons alike.

Guarantees: two different contents never get the same address (BLAKE3 is collision-resistant; it is no secret and no
proof of who wrote it). docs/state-store.md says why it is not SHA-256. Hashing lets other threads run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from blake3 import blake3

ALGORITHM = "blake3"

_ADDRESS = re.compile(r"[0-9a-f]{64}")

Content = bytes | bytearray | memoryview


def address(data: Content) -> str:
    """The address of `data` (contiguous bytes)."""
    return blake3(data).hexdigest()


def address_of_parts(parts: Iterable[Content]) -> str:
    """The address of `parts` joined, without joining them."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def is_address(text: object) -> bool:
    return isinstance(text, str) and _ADDRESS.fullmatch(text) is not None
