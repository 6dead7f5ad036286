"""What a cell was granted, as this process knows it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

COOPERATIVE = "cooperative"
GREEN = "green"
PERCENTAGE = "percentage"
MIG = "mig"
"""How a slice is held, as `gpu_daemon/mechanism.py` chose it for the device (docs/slices.md)."""


@dataclass(frozen=True)
class Share:
    """The part of one device: its uuid, index on the host, model, TPC numbers, bytes of device memory.

    mechanism: how the host offers to hold a slice of it, `why` it is not a stronger one; of: TPCs of the whole device;
    mps: pipe folder of the MPS daemon to use, '' for none. clock: of a simulated device, a part of its highest.
    """

    uuid: str
    index: int
    model: str
    tpcs: tuple[int, ...]
    memory: int
    whole: bool
    simulated: bool
    mechanism: str = COOPERATIVE
    why: str = ""
    of: int = 0
    mps: str = ""
    lent: tuple[int, ...] = ()
    """Those of `tpcs` that are on loan: they may go back while the cell runs, and others come (docs/rightsizing.md)."""
    clock: float = 1.0


@dataclass(frozen=True)
class Grant:
    """What the running cell may use of this host's GPUs; it ends with the cell."""

    id: str
    host: str
    n: int
    shares: tuple[Share, ...]
    asked: int = 0
    """TPCs that the cell asked for, where right-sizing had a word in what it got; else 0."""
    why: str = ""
    """Why it got as many as it got."""
    version: int = 0
    """Counts the changes of its TPCs."""
    loan: str = ""
    """Why nothing is lent to it, though it asked."""

    @property
    def devices(self) -> tuple[str, ...]:
        """UUIDs of the granted devices, in the order CUDA numbers them in this process."""
        return tuple(share.uuid for share in self.shares)

    @property
    def tpcs(self) -> int:
        """TPCs granted, over all devices (1 TPC = 2 SMs)."""
        return sum(len(share.tpcs) for share in self.shares)

    @property
    def memory(self) -> int:
        """Bytes of device memory granted, over all devices."""
        return sum(share.memory for share in self.shares)

    @property
    def whole(self) -> bool:
        return all(share.whole for share in self.shares)

    @property
    def simulated(self) -> bool:
        """True where no real GPU stands behind the grant: the cell runs on the CPU."""
        return any(share.simulated for share in self.shares)


def from_wire(raw: Mapping[str, Any] | None) -> Grant | None:
    """The grant in the daemon's answer to a bid; None for a CPU cell."""
    if not raw:
        return None
    shares = tuple(
        Share(
            uuid=share["uuid"],
            index=share["index"],
            model=share.get("model", ""),
            tpcs=tuple(share.get("tpcs", ())),
            memory=share.get("memory", 0),
            whole=share.get("whole", True),
            simulated=share.get("kind") == "simulated",
            mechanism=share.get("mechanism") or COOPERATIVE,
            why=share.get("why", ""),
            of=share.get("of", 0),
            mps=share.get("mps", ""),
            lent=tuple(share.get("lent", ())),
            clock=float(share.get("clock", 1.0)),
        )
        for share in raw.get("shares", ())
    )
    asked, why, version, loan = raw.get("asked", 0), raw.get("why", ""), raw.get("version", 0), raw.get("loan", "")
    return Grant(raw.get("grant", ""), raw.get("host", ""), raw.get("n", 0), shares, asked, why, version, loan)


def resliced(grant: Grant, tpcs: Collection[int], lent: int) -> Grant:
    """The grant of one slice, on these TPCs, so many of them on loan."""
    (share,) = grant.shares
    loans = [t for t in sorted(tpcs) if t in share.lent or t not in share.tpcs]
    share = replace(share, tpcs=tuple(sorted(tpcs)), lent=tuple(loans[len(loans) - lent :]))
    return replace(grant, shares=(share,))
