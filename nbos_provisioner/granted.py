"""A grant, and what a cell used of it, in a few words for its output. Pure.

Both come from a replica, which runs user code: what cannot be read is left out, and nothing here raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GIB = 1 << 30
LONGEST = 60
"""Characters of a name."""


def describe(grant: Any) -> str:
    """`16 TPCs and 20.0 GiB of Simulated GPU`, `2 GPUs (H200)`; '' without a grant."""
    shares = grant.get("shares") if isinstance(grant, Mapping) else None
    shares = [share for share in shares if isinstance(share, Mapping)] if isinstance(shares, list) else []
    if not shares:
        return ""
    model = str(shares[0].get("model", ""))[:LONGEST]
    if all(share.get("whole") is True for share in shares):
        return f"{len(shares)} GPU{'s' if len(shares) > 1 else ''}" + (f" ({model})" if model else "")
    tpcs = sum(len(share["tpcs"]) for share in shares if isinstance(share.get("tpcs"), list))
    memory = sum(number(share, "memory") for share in shares)
    return f"{tpcs} TPCs and {memory / GIB:.1f} GiB" + (f" of {model}" if model else "")


def used(told: Any) -> str:
    """`held it for 4.2 s, 67 TPC·s, at most 3.10 GiB of its memory used by torch`; '' when nothing was told."""
    if not isinstance(told, Mapping) or "held" not in told:
        return ""
    held, tpcs, peak = (number(told, name) for name in ("held", "tpcs", "peak"))
    memory = f", at most {peak / GIB:.2f} GiB of its memory used by torch" if peak else ""
    used = number(told, "tpc_seconds") or held * tpcs
    lent = number(told, "lent")
    loans = f", up to {lent:.0f} TPCs of it on loan" if lent else ""
    return f"held it for {held:.1f} s, {used:.0f} TPC·s{loans}{memory}"


def number(told: Mapping[str, Any], name: str) -> float:
    value = told.get(name)
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e18
    return value if good else 0  # type: ignore[return-value]
