"""What replicas publish on iopub, and what of it the clients are given.

Guarantees: what the current executor says within its fencing token passes, in its order, without the token; of another
replica only what it says about a request that it was given while it was the executor, and has not finished; a cell's
busy and idle are those that the router keeps account of, all other statuses pass as they are.
"""

from __future__ import annotations

from typing import Any

from .fleet import Fleet, token_of
from .forwarding import Forwarding
from .instructions import Publish
from .keeping import Keeping
from .messages import DELIMITER, BadMessage, load, text
from .outbox import Outbox
from .runner import Runner

KEPT = b"nbos_outputs"
"""What a replica has kept of its cells, for the router (`keeping.py`)."""

PROGRESS = b"nbos_progress"
"""How far the replication of a cell's changes is: for the router, which shows it."""

TOUCH = b"nbos_touch"
"""How the wait of a running cell stands that needs a GPU on its way: for the router, which shows it."""


class Outputs:
    def __init__(self, fleet: Fleet, runner: Runner, forwarding: Forwarding, keeping: Keeping, out: Outbox) -> None:
        self._fleet, self._runner, self._forwarding, self._out = fleet, runner, forwarding, out
        self._keeping = keeping

    def take(self, replica: int, topic: bytes, frames: list[Any], now: float) -> bool:
        """Pass on what is to be passed on; True when an execution came to its end by it."""
        fleet = self._fleet
        if replica == fleet.executor and topic.startswith(fleet.prefix):
            topic = topic[len(fleet.prefix) :]
            fleet.since = fleet.token
        else:
            admitted = self._answers(replica, topic, frames)
            # Shell and iopub are two connections: what a candidate says may overtake its lead.
            if admitted is None and self._runner.asking(replica) and fleet.hold(replica, topic, frames):
                return False
            admitted = fleet.admit(replica, topic) if admitted is None else admitted
            if admitted is None:
                return False
            topic = admitted
        if topic.endswith(b"status"):
            return self._status(replica, topic, frames)
        if topic == KEPT:
            self._keeping.found(load(frames[6], "content") if len(frames) > 6 else {})
            return False
        if topic == PROGRESS:
            if len(frames) < 7 or text(frames[1]) != DELIMITER:
                return False
            return self._runner.progress(load(frames[4], "parent header"), load(frames[6], "content"), now)
        if topic == TOUCH:
            if len(frames) >= 7 and text(frames[1]) == DELIMITER:
                self._runner.touched(replica, load(frames[4], "parent header"), load(frames[6], "content"), now)
            return False
        self._out.append(Publish([topic, *frames[1:]]))
        return False

    def _answers(self, replica: int, topic: bytes, frames: list[Any]) -> bytes | None:
        """The topic for the client when this is about a request that `replica` was given and is not done with."""
        found = token_of(topic)
        if found is None or len(frames) < 7 or text(frames[1]) != DELIMITER:
            return None
        asked = self._forwarding.asked(replica, load(frames[4], "parent header").get("msg_id", ""))
        return found[1] if asked else None

    def _status(self, replica: int, topic: bytes, frames: list[Any]) -> bool:
        """Pass on a status, unless the router keeps the account of it."""
        if len(frames) < 7 or text(frames[1]) != DELIMITER:
            raise BadMessage(f"a status of {self._fleet.name(replica)} has {len(frames)} frames")
        parent, state = load(frames[4], "parent header"), load(frames[6], "content").get("execution_state")
        msg_id = parent.get("msg_id", "")
        if state == "starting" or str(parent.get("msg_type", "")).startswith("nbos_"):
            return False
        if parent.get("session") == self._out.signer.session:
            return False
        if self._runner.owns(msg_id):
            if state != "idle" or not self._runner.idle(replica, msg_id):
                return False
            self._out.append(Publish([topic, *frames[1:]]))
            self._runner.after_idle(msg_id)
            return True
        self._forwarding.status(msg_id, str(state))
        self._out.append(Publish([topic, *frames[1:]]))
        return False
