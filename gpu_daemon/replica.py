"""One replica of this host, as its daemon knows it: its process, its socket, what it holds and how far it has come."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpu_daemon import memory
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.runtime import Handle
from nbos_cluster.arena import Arena
from nbos_cluster.records import ClaimRecord, GrantRecord, Ports, ReplicaRecord
from nbos_cluster.wire import Message

if TYPE_CHECKING:
    from gpu_daemon.ahead import ClaimAhead
    from gpu_daemon.checkpoint.freezer import Frozen
    from gpu_daemon.sessions import Session

EXIT_GRACE = 1.0
"""Seconds between asking a replica to leave and ending its process."""

LOST_NAMES = 200
LOST_TEXT = 300
"""What a replica's record tells of names that could not be replicated, at most; the state log has all of it."""


@dataclass
class Held:
    """The claim that this replica holds. old_tokens: those it had before its lease was lost and it was renewed."""

    n: int
    token: int
    claim: ClaimRecord
    grant: GrantRecord | None = None
    old_tokens: set[int] = field(default_factory=set)
    waited: float = 0.0
    """Seconds that it waited in this host's queue for its grant."""
    follows: bool = False
    """Its cell was asked for at once after the one before."""

    def knows(self, token: object) -> bool:
        return token == self.token or token in self.old_tokens


@dataclass
class LocalReplica:
    id: ReplicaId
    folder: Path
    ip: str
    ports: Ports
    incarnation: int = 1
    state: Literal["starting", "ready", "failed"] = "starting"
    reason: str = ""
    handle: Handle | None = None
    session: Session | None = None
    server: asyncio.Server | None = None
    held: Held | None = None
    appended: tuple[int, int] = (-1, 0)
    """n and token of the newest entry that this replica appended."""
    appended_at: float = float("-inf")
    """When that was (`Site.now`)."""
    ahead: ClaimAhead | None = None
    withdrawing: asyncio.Task[Any] | None = None
    """Gives back a claim that nothing ran under. Until it is done the replica makes no other."""
    withdrawn: int = 0
    """The token of the latest such claim."""
    appending: asyncio.Task[None] | None = None
    applied: int = -1
    arena: Arena | None = None
    """Memory shared with its process, once that has asked for it."""
    python: str = ""
    lost: dict[str, str] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    imported: tuple[str, ...] = ()
    """Installed modules that its cells, or those it applied, imported, and that nobody has taken note of yet."""
    starts: int = 0
    """Processes that this daemon has started, or found, for it."""
    frozen: Frozen | None = None
    """What the driver holds of it in host memory: nothing may run in it before that is back."""
    resting: asyncio.Future[None] | None = None
    """Done when its process has said that it touches no CUDA any more, in answer to the `rest_number`th such ask."""
    rest_number: int = 0
    death_reason: str = ""
    """Why the daemon itself ended it (memory limit, …): told instead of the signal."""

    @property
    def name(self) -> str:
        return f"replica {self.id.index} of kernel {self.id.kernel}"

    def record(self, host: str) -> ReplicaRecord:
        names = list(self.lost)[:LOST_NAMES]
        return ReplicaRecord(
            index=self.id.index,
            host=host,
            state=self.state,
            pid=self.handle.pid if self.handle is not None else 0,
            container=self.handle.container if self.handle is not None else "",
            ip=self.ip,
            ports=self.ports,
            applied=self.applied,
            incarnation=self.incarnation,
            python=self.python,
            lost={name: self.lost[name][:LOST_TEXT] for name in names},
            reason=self.reason,
            memory=memory.host.available(),
            lacks=self.lacks,
        )

    def push(self, message: Message) -> None:
        """Tell the replica, when it is connected."""
        if self.session is not None:
            self.session.push(message)

    def end(self, reason: str) -> None:
        """Ask the process to leave, and make it leave a second later. `handle.wait` then returns."""
        self.death_reason = self.death_reason or reason
        self.push({"type": "exit", "reason": reason})
        handle = self.handle
        if handle is not None:
            asyncio.get_running_loop().call_later(EXIT_GRACE, handle.kill)

    def begin(self) -> None:
        """A new process starts: what the old one knew and held is gone."""
        self.held, self.appended, self.appending = None, (-1, 0), None
        self.applied, self.lost, self.lacks, self.python, self.death_reason = -1, {}, (), "", ""
        self.drop_arena()

    def drop_arena(self) -> None:
        arena, self.arena = self.arena, None
        if arena is not None:
            arena.close()
