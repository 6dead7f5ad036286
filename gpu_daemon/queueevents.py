"""What the queue is told, and what it answers: `queue`'s events and instructions. No IO."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_daemon.ledger import Request
from gpu_daemon.loans import Late, Reslice
from nbos_cluster.records import GrantRecord


@dataclass(frozen=True)
class Arrive:
    """A request that may wait (`wait`), or wants an answer now."""

    request: Request
    now: float
    wait: bool = True


@dataclass(frozen=True)
class Leave:
    """The request under this grant name does not wait any more."""

    grant: str
    now: float


@dataclass(frozen=True)
class Ended:
    """A grant was given back. `used`: it really ran (false: its claim was lost, nothing is learnt from it)."""

    grant: str
    now: float
    used: bool = True


@dataclass(frozen=True)
class Brings:
    """While it waits its process moved so many bytes to host memory, in all: they come back with its grant."""

    grant: str
    away: int
    now: float


@dataclass(frozen=True)
class Room:
    """Something else changed (a device's health, a restored grant, the hour): look again."""

    now: float


@dataclass(frozen=True)
class Gave:
    """The grant's cell is on its slice of this version, and nothing of it runs elsewhere."""

    grant: str
    version: int
    now: float


Event = Arrive | Leave | Ended | Brings | Room | Gave


@dataclass(frozen=True)
class Admit:
    """The request has its grant; it left the queue."""

    grant: GrantRecord


@dataclass(frozen=True)
class Refuse:
    """The request gets nothing; it is not in the queue. code: `busy` or `impossible`."""

    grant: str
    code: str
    reason: str


Instruction = Admit | Refuse | Reslice | Late


@dataclass(frozen=True)
class Tell:
    """The request waits: why, at which place of how many (1 = next), for about how many seconds (None: not known)."""

    grant: str
    position: int
    of: int
    reason: str
    estimate: float | None
