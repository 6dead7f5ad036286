"""One numbered execution in the router's hands: a cell, or a sync (which replicates changes made between cells)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from .election import Election
from .messages import BadMessage, Message


class Phase(Enum):
    ASKING = "asking"
    RUNNING = "running"
    SETTLING = "settling"
    OVER = "over"


@dataclass(slots=True)
class Execution:
    """`led`: some replica has claimed it. `replied`, `idle`: what the client has been given. `committed`: its entry
    stands in the log. `message_session`: the Jupyter session of the process that leads it. `display`, `shown`: why it
    waits, in its output. `queued`: since when it waits for a GPU; `got`, `got_at`, `waited`: which one, when, and after
    how many seconds, while its output is still to say what it used."""

    message: Message
    kind: Literal["cell", "sync"] = "cell"
    n: int = -1
    attempt: int = 1
    phase: Phase = Phase.ASKING
    election: Election = field(default_factory=Election)
    executor: int | None = None
    token: int = -1
    led: bool = False
    replied: bool = False
    idle: bool = False
    committed: bool = False
    silent: bool = False
    stop_on_error: bool = True
    failed: bool = False
    display: str = ""
    shown: str = ""
    started: float = 0.0
    wake: float | None = None
    idle_by: float | None = None
    tries: int = 0
    message_session: str = ""
    queued: float | None = None
    got: str = ""
    got_at: float = 0.0
    waited: float = 0.0

    @property
    def msg_id(self) -> str:
        return self.message.msg_id

    @property
    def cell(self) -> bool:
        return self.kind == "cell"


def cell(message: Message, now: float) -> Execution:
    """The execution that an execute_request asks for. Raises BadMessage when its content makes no sense."""
    content = message.content
    if not isinstance(content.get("code"), str):
        raise BadMessage("its content has no code")
    return Execution(
        message,
        silent=bool(content.get("silent", False)),
        stop_on_error=bool(content.get("stop_on_error", True)),
        started=now,
    )
