"""What goes into the router's state machine (events) and what comes out of it (instructions).

Times are seconds of a monotonic clock. A replica is named by its index. Frames are opaque to whoever carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .messages import Message

Channel = Literal["shell", "control", "stdin"]


@dataclass(frozen=True, slots=True)
class Client:
    """A checked message of a client."""

    channel: Channel
    message: Message


@dataclass(frozen=True, slots=True)
class FromReplica:
    """A message of a replica on shell, control or stdin."""

    replica: int
    channel: Channel
    message: Message


@dataclass(frozen=True, slots=True)
class Output:
    """A message of a replica on iopub, topic first."""

    replica: int
    frames: list[Any]


@dataclass(frozen=True, slots=True)
class Up:
    """Connected on all channels, its subscription in force."""

    replica: int


@dataclass(frozen=True, slots=True)
class Alive:
    """It has answered a heartbeat."""

    replica: int


@dataclass(frozen=True, slots=True)
class Lost:
    replica: int
    reason: str


@dataclass(frozen=True, slots=True)
class Member:
    """One replica as the gateway or another replica describes it."""

    index: int
    host: str
    state: str
    ip: str = ""
    ports: dict[str, int] = field(default_factory=dict)
    applied: int = -1
    pid: int = 0
    reason: str = ""

    @property
    def reachable(self) -> bool:
        return self.state == "ready" and bool(self.ip) and bool(self.ports)


@dataclass(frozen=True, slots=True)
class Members:
    """`revision`: etcd's, as of which the list is true; lists come from several daemons, late ones among them."""

    epoch: int
    members: tuple[Member, ...]
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Reset:
    """The kernel is restarted by its user: everything that waits is aborted, numbers are asked for again."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline that the machine asked for has come (or any later time)."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """Somebody has begun to listen to outputs."""


Event = Client | FromReplica | Output | Up | Alive | Lost | Members | Reset | Tick | Subscribed


@dataclass(frozen=True, slots=True)
class ToReplica:
    replica: int
    channel: Channel
    frames: list[Any]


@dataclass(frozen=True, slots=True)
class ToClient:
    channel: Channel
    frames: list[Any]


@dataclass(frozen=True, slots=True)
class Publish:
    """On iopub: topic first."""

    frames: list[Any]


@dataclass(frozen=True, slots=True)
class Connect:
    """Connect to a replica, with new sockets: nothing that was queued for its predecessor may reach it."""

    replica: int
    ip: str
    ports: dict[str, int]


@dataclass(frozen=True, slots=True)
class Disconnect:
    replica: int


@dataclass(frozen=True, slots=True)
class Tell:
    """An event for the provisioner."""

    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Log:
    text: str


Instruction = ToReplica | ToClient | Publish | Connect | Disconnect | Tell | Log
