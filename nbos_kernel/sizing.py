"""Whether the daemon may give this cell fewer TPCs than it asks for, and by what it knows the cell.

It may, unless the cell says `exact` (`%%gpu tpcs=32 exact`, or `"exact": true` in its metadata.nbos), or the notebook
said `%nbos rightsizing off`. The daemon itself may be told never to (`GPUDaemon.allowed_slowdown = 0`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import resources
from .fingerprint import fingerprint

_on = True


def switch(words: list[str]) -> str | None:
    """`%nbos rightsizing [on|off]`: what to print, None where the words make no sense."""
    global _on
    if words and words not in (["on"], ["off"]):
        return None
    if words:
        _on = words == ["on"]
    return (
        "Right-sizing is on: a cell that asks for TPCs may get fewer, where that was measured to cost little."
        if _on
        else "Right-sizing is off: every cell gets what it asks for."
    )


def key(code: str, metadata: Mapping[str, Any], needs: Mapping[str, Any], namespace: Mapping[str, Any]) -> str:
    """The cell's fingerprint for its bid; '' where it must get exactly what it asks for, or asks for no GPU."""
    if not _on or resources.exact(code, metadata) or not (needs.get("tpcs") or needs.get("gpus")):
        return ""
    return fingerprint(resources.blank_first_line(code), namespace)
