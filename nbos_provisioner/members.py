"""The membership list of a kernel as the gateway's KernelModel and the replicas' nbos_members carry it."""

from __future__ import annotations

from typing import Any

from .instructions import Member, Members

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")


def members_from(content: dict[str, Any]) -> Members:
    """The members in `content`; entries that make no sense are left out."""
    found = []
    for entry in content.get("members") or []:
        if isinstance(entry, dict) and isinstance(entry.get("index"), int):
            found.append(_member(entry))
    return Members(_number(content.get("epoch"), 0), tuple(found), _number(content.get("revision"), 0))


def _member(entry: dict[str, Any]) -> Member:
    ports = entry.get("ports") or {}
    whole = isinstance(ports, dict) and all(_number(ports.get(channel), 0) > 0 for channel in CHANNELS)
    return Member(
        index=entry["index"],
        host=str(entry.get("host") or ""),
        state=str(entry.get("state") or ""),
        ip=str(entry.get("ip") or ""),
        ports={channel: int(ports[channel]) for channel in CHANNELS} if whole else {},
        applied=_number(entry.get("applied"), -1),
        pid=_number(entry.get("pid"), 0),
        reason=str(entry.get("reason") or ""),
    )


def _number(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
