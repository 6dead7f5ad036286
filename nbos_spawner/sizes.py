"""Sizes of memory as people write them: `20G`, `512M`, `1.5T`, or bytes. Powers of 1024."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d{1,6})?)\s*([KMGT]?)(?:i?B)?\s*$", re.IGNORECASE)


def parse_size(value: object) -> int:
    """Bytes in `value`, a whole number or a text such as '20G'. Raises ValueError that shows how to write
    one."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no size; write bytes or e.g. '20G'")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"a size cannot be negative, {value} is")
        return value
    match = _SIZE.match(value)
    if not match:
        raise ValueError(f"{value[:40]!r} is no size; write bytes or e.g. '20G', '512M'")
    return (
        int(float(match[1]) * _UNITS[match[2].upper()]) if "." in match[1] else int(match[1]) * _UNITS[match[2].upper()]
    )


def show_size(size: int) -> str:
    """`size` bytes for people: the largest unit that keeps the value exact to one decimal."""
    for unit in ("T", "G", "M", "K"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f}".removesuffix(".0") + unit
    return str(size)
