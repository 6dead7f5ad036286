"""Sizes as people write them in configuration files: 80G, 512M."""

from __future__ import annotations

import re

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*$", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """The number of bytes. Raises ValueError."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no size; write for example 80G or 512M")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
