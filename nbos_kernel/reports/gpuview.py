"""The text of `%nbos gpu`: what the kernel may use, what this cell holds, what the latest cells got, who waits. Pure.

What others hold is told as room that is not there, never by name: who else computes on a host is nobody's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..gpu import shown
from ..gpu.borrowing import Moved
from ..gpu.confine import Held
from ..gpu.grants import Grant
from ..gpu.uses import Use

GIB = 1 << 30


LATER = "this cell holds no GPU yet: it gets one when it first uses one"


def text(
    status: Mapping[str, Any],
    rows: Sequence[Use],
    running: Use | None,
    grant: Grant | None,
    held: Sequence[Held],
    moves: Sequence[Moved] = (),
    later: bool = False,
) -> str:
    """status: the daemon's, as `%nbos status` has it. rows: of the latest cells, oldest first. running: this cell's;
    moves: what became of its loans; later: it has none, and may get one."""
    gpu = status.get("gpu") or {}
    lines = _may(gpu)
    if running is None:
        lines.append(LATER if later else shown.NONE)
    else:
        lines += [f"this cell holds: {line}" for line in shown.lines(grant, held)]
        lines.append(
            f"  for {seconds(running.held)} so far, after {seconds(running.waited)} of waiting{_peak(running)}"
        )
        lines += [f"  {line}" for line in _moves(moves)]
    lines += [f"on {status.get('host') or 'this host'}: {line}" for line in map(_room, gpu.get("devices") or ())]
    lines += [line for row in gpu.get("left") or () for line in _left(row)]
    if rows:
        lines += ["the latest cells with a GPU:", *(f"  {_row(row)}" for row in rows)]
    lines += [f"waiting: {_waiting(ticket)}" for ticket in status.get("queue") or ()]
    if status.get("error"):
        lines.append(f"the host's daemon cannot be asked: {status['error']}")
    return "\n".join(lines)


SHOWN = 6


def _moves(moves: Sequence[Moved]) -> list[str]:
    """The latest ones."""
    more = [f"({len(moves) - SHOWN} changes before)"] if len(moves) > SHOWN else []
    return [*more, *map(_move, moves[-SHOWN:])]


def _move(move: Moved) -> str:
    by, when = move.after - move.before, f"after {seconds(move.seconds)}"
    if by >= 0:
        return f"{when}: {by} more TPCs lent by others, {move.after} in all"
    stopped = "it stood still with none" if not move.after else f"{move.after} left"
    return f"{when}: {-by} TPCs given back, within {move.took:.2f} s, {stopped}"


def seconds(value: float) -> str:
    """`0.4 s`, `75 s`, `12 min`, `3.5 h`."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def amounts(asked: Mapping[str, Any]) -> str:
    """What a request or a limit comes to."""
    parts = [f"{count} {name}" for name, count in _counts(asked) if count]
    memory = f", {asked['memory'] / GIB:.1f} GiB on each" if asked.get("memory") else ""
    return (" or ".join(parts) + memory) if parts else "no GPU"


def _counts(asked: Mapping[str, Any]) -> list[tuple[str, int]]:
    gpus, tpcs = int(asked.get("gpus") or 0), int(asked.get("tpcs") or 0)
    return [("GPU" if gpus == 1 else "GPUs", gpus), ("TPCs", tpcs)]


def _may(gpu: Mapping[str, Any]) -> list[str]:
    if "most" not in gpu:
        return []
    most, default = amounts(gpu["most"]), amounts(gpu.get("default") or {})
    return [f"a cell of this kernel may use: {most}; without a first line %%gpu or %%cpu: {default}"]


def _room(device: Mapping[str, Any]) -> str:
    what = f"GPU {device['index']}, {device['model']}"
    if not device["healthy"]:
        return f"{what}: it cannot be used now ({device['reason']})"
    tpcs, memory = f"{device['tpcs_free']} of {device['tpcs']} TPCs", f"{device['memory_free'] / GIB:.1f}"
    return f"{what}: {tpcs} and {memory} of {device['memory'] / GIB:.1f} GiB free"


def _left(row: Mapping[str, Any]) -> list[str]:
    """What a replica's process has on devices between cells."""
    who = f"replica {row['replica']}"
    stays = f" (not given back when asked: {row['stays']})" if row.get("stays") else ""
    lines = [f"{who} has {size / GIB:.1f} GiB on GPU {index}{stays}" for index, size in row["devices"].items()]
    if row.get("away"):
        lines.append(f"{who} has {row['away'] / GIB:.1f} GiB in host memory (a checkpoint), back before its next cell")
    return lines


def _row(use: Use) -> str:
    what = f"{use.devices} GPU{'s' if use.devices > 1 else ''}" if use.whole else f"{use.tpcs} TPCs"
    got = f"{what}, {use.memory / GIB:.1f} GiB of {use.model} on {use.host}"
    times = f"waited {seconds(use.waited)}, held {seconds(use.held)}, {use.tpc_seconds:.0f} TPC·s"
    times += f", up to {use.lent} TPCs of it on loan" if use.lent else ""
    return f"[{use.count}]: {got}; {times}{_peak(use)}"


def _peak(use: Use) -> str:
    return f", at most {use.peak / GIB:.2f} GiB of its memory used by torch" if use.peak else ""


def _waiting(ticket: Mapping[str, Any]) -> str:
    estimate = ticket.get("estimate")
    about = f", about {seconds(estimate)}" if isinstance(estimate, int | float) and estimate >= 0 else ""
    place = f"position {ticket.get('position')} of {ticket.get('of')} on {ticket.get('host')}"
    return f"execution {ticket.get('n')}, {place}{about}: {ticket.get('reason')}"
