"""A grant, and what holds the cell to it, for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from .confine import Held
from .grants import COOPERATIVE, GREEN, MIG, PERCENTAGE, Grant, Share

GIB = 1 << 30
NONE = (
    "this cell holds no GPU: ask for one in its first line, `%%gpu 1` for a whole device, or `%%gpu tpcs=16 mem=20G` "
    "for a slice"
)


def describe(grant: Grant | None, held: Sequence[Held]) -> str:
    """The text of `%nbos gpu`. held: of each share, () while torch has not started CUDA."""
    return "\n".join(lines(grant, held)) if grant is not None else NONE


def lines(grant: Grant | None, held: Sequence[Held]) -> list[str]:
    """A line for each device of the grant, and what right-sizing had to say."""
    shares = grant.shares if grant is not None else ()
    known = [*held, *[None] * (len(shares) - len(held))]
    sized = [f"right-sizing: {grant.why}"] if grant is not None and grant.why else []
    refused = [f"on loan: {grant.loan}"] if grant is not None and grant.loan else []
    return [*(_line(share, one) for share, one in zip(shares, known, strict=True)), *sized, *refused]


def _line(share: Share, held: Held | None) -> str:
    tpcs = f"{len(share.tpcs)} TPCs" + (f" of {share.of}" if share.of else "")
    tpcs += f" ({len(share.lent)} of them on loan: others' idle quota)" if share.lent else ""
    what = f"{tpcs}, {share.memory / GIB:.1f} GiB on {share.model} {share.uuid}".replace("  ", " ")
    if share.simulated:
        return f"{what}; simulated: for real code it is the CPU, nbos_kernel.simgpu plays it"
    if share.whole:
        return f"{what}; the whole device, nobody else computes on it"
    return f"{what}; {_by(share, held)}"


def _by(share: Share, held: Held | None) -> str:
    mechanism = held.mechanism if held is not None else share.mechanism
    reason = held.reason if held is not None else share.why
    number = f"to {held.tpcs} TPCs " if held is not None and held.tpcs else ""
    text = {
        MIG: "held by MIG: a device of its own, in hardware",
        GREEN: f"held {number}by a green context under MPS, for work on torch's current stream; threads and streams of "
        "your own leave it (cooperative)",
        PERCENTAGE: f"capped {number}by MPS for the whole process; which ones may be other slices' too",
        COOPERATIVE: "cooperative: processes take turns on the device, and nothing holds them to their TPCs",
    }.get(mechanism, mechanism)
    return f"{text} ({reason})" if reason else text
