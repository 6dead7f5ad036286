"""Requests that go to the current executor without a number, and what becomes of them when it is lost.

Guarantees: each one gets at most one reply; when its replica is lost it is asked again where that is harmless
(completion, inspection, …), and answered with an error where it is not; a busy that the client saw gets its idle, also
when another replica has begun to run a cell meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from .fleet import Fleet
from .instructions import Channel, ToClient, ToReplica
from .messages import Message, parse
from .outbox import Outbox, error

HARMLESS = {
    "kernel_info_request",
    "complete_request",
    "inspect_request",
    "history_request",
    "is_complete_request",
    "comm_info_request",
    "list_subshell_request",
    "usage_request",
}

KEPT = 4096
"""Requests remembered at most; older ones are no longer answered when their replica is lost."""

COMMS = {"comm_open", "comm_msg", "comm_close"}

DIRTYING = {*COMMS, "execute_request"}
"""May change variables without a number (execute_request: on a subshell)."""

DIRTYING_DEBUG = {"evaluate", "setVariable", "setExpression"}


@dataclass(slots=True)
class Forwarded:
    channel: Channel
    message: Message
    replica: int
    replied: bool = False
    busy: bool = False
    idle: bool = False

    @property
    def over(self) -> bool:
        """Reply and idle come over two connections, in either order; comms have no reply."""
        return self.idle and (self.replied or not self.message.msg_type.endswith("_request"))


class Forwarding:
    """`dirty`: the replica on which something forwarded may have changed variables; a sync is due."""

    def __init__(self, fleet: Fleet, out: Outbox) -> None:
        self.fleet = fleet
        self.out = out
        self.dirty: int | None = None
        self._open: OrderedDict[str, Forwarded] = OrderedDict()
        self._again = 0

    def send(self, channel: Channel, message: Message, replica: int) -> None:
        self._open[message.msg_id] = Forwarded(channel, message, replica)
        if len(self._open) > KEPT:
            self._open.popitem(last=False)
        self.out.append(ToReplica(replica, channel, message.wire()))
        command = message.content.get("command") if message.msg_type == "debug_request" else ""
        if command == "attach":
            self.fleet.debugged = replica
        elif command == "disconnect":
            self.fleet.debugged = None
        if message.msg_type == "create_subshell_request":
            self.fleet.subshells[message.msg_id] = replica
        if message.msg_type in DIRTYING or command in DIRTYING_DEBUG:
            self.dirty = replica

    def asked(self, replica: int, msg_id: str) -> bool:
        """Whether `msg_id` was sent to `replica`, and is not over: what it says about that is for the client."""
        entry = self._open.get(msg_id)
        return entry is not None and entry.replica == replica

    def open_work(self) -> bool:
        """Whether something that changes variables is still being handled."""
        return any(entry.message.msg_type in DIRTYING and entry.busy for entry in self._open.values())

    def keeps_busy(self, replica: int) -> bool:
        """Whether the replica's main thread has comm messages to handle, or does so."""
        return any(
            entry.message.msg_type in COMMS and entry.message.subshell is None
            for entry in self._open.values()
            if entry.replica == replica
        )

    def reply(self, replica: int, channel: Channel, message: Message, parent: dict[str, Any]) -> None:
        entry = self._open.get(parent.get("msg_id", ""))
        if entry is None or entry.replica != replica or entry.replied:
            return
        entry.replied = True
        if entry.over:
            del self._open[entry.message.msg_id]
        if entry.message.msg_type == "execute_request":
            self.dirty = replica
        self._subshells(entry, message)
        self.out.append(ToClient(channel, message.wire()))

    def _subshells(self, entry: Forwarded, reply: Message) -> None:
        known, kind = self.fleet.subshells, entry.message.msg_type
        if kind == "create_subshell_request":
            known.pop(entry.message.msg_id, None)
            made = reply.content.get("subshell_id")
            if isinstance(made, str):
                known[made] = entry.replica
        elif kind == "delete_subshell_request" and reply.content.get("status") == "ok":
            known.pop(str(entry.message.content.get("subshell_id")), None)

    def status(self, msg_id: str, state: str) -> None:
        entry = self._open.get(msg_id)
        if entry is None:
            return
        entry.busy = state == "busy"
        if state == "idle":
            entry.idle = True
            if entry.over:
                del self._open[msg_id]
            if entry.message.msg_type in DIRTYING:
                self.dirty = entry.replica

    def lost(self, replica: int) -> list[tuple[Channel, Message]]:
        """Answer what the lost replica cannot; the messages to forward again, in their order."""
        again: list[tuple[Channel, Message]] = []
        for msg_id, entry in [item for item in self._open.items() if item[1].replica == replica]:
            del self._open[msg_id]
            if not entry.replied and entry.message.msg_type in HARMLESS:
                again.append((entry.channel, self._anew(entry.message)))
                continue
            if not entry.replied and entry.message.msg_type.endswith("_request"):
                self._fail(entry)
            if entry.busy:
                self.out.status("idle", entry.message.header)
        return again

    def _anew(self, message: Message) -> Message:
        # A replica that comes back has seen the signature, and would drop the same message as a replay.
        self._again += 1
        return parse(self.out.signer.with_metadata(message, {"nbos_again": self._again}))

    def _fail(self, entry: Forwarded) -> None:
        content = error("NBOSReplicaDied", f"{self.fleet.name(entry.replica)} was lost before it answered")
        if entry.message.msg_type == "execute_request":
            shown = {key: content[key] for key in ("ename", "evalue", "traceback")}
            self.out.publish("error", shown, entry.message.header)
        self.out.reply(entry.message, content, entry.channel)
