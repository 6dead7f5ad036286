"""The router as a state machine: what clients and replicas say goes in, what to send where comes out. No IO, no clock.

Guarantees: messages of the main shell are handled in their order (only comms pass a queue of cells, because a running
cell may wait for them); requests that nobody can answer yet are held until somebody can; replicas' outputs reach the
clients only from the current executor under its current fencing token. The numbered executions are `runner.py`'s, what
replicas publish is `outputs.py`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

from nbos_cluster.kept import Bounds

from . import execution as executions
from .absent import KERNEL_INFO, Absence
from .execution import Execution, Phase
from .fleet import Fleet
from .forwarding import COMMS, Forwarding
from .instructions import (
    Alive,
    Channel,
    Client,
    Event,
    FromReplica,
    Instruction,
    Lost,
    Members,
    Output,
    Reset,
    Subscribed,
    ToClient,
    ToReplica,
    Up,
)
from .keeping import Keeping
from .members import members_from
from .messages import BadMessage, Message, Signer, load, parse, text
from .notices import LINE_AFTER
from .outbox import Outbox
from .outputs import Outputs
from .runner import Runner

SYNC_AFTER = 0.3
"""Seconds without a message before changes made between cells are replicated."""

STATUS_PATIENCE = 1.0
QUEUE_LIMIT = 10_000
"""Messages held for the executor at most; further ones are dropped with a log line."""


class RouterCore:
    def __init__(
        self,
        signer: Signer,
        *,
        rerun: bool = True,
        ports: dict[str, int] | None = None,
        keep: Bounds | None = None,
        line_after: float = LINE_AFTER,
    ) -> None:
        self.out = Outbox(signer)
        self.fleet = Fleet()
        self.keeping = Keeping(self.fleet, self.out, keep or Bounds(0, 0))
        bounds = self.keeping.kept.bounds
        self.runner = Runner(self.fleet, self.out, rerun=rerun, keep=bounds, line_after=line_after)
        self.runner.on_over = self._over
        self.runner.on_executor = self._led
        self.forwarding = Forwarding(self.fleet, self.out)
        self.runner.keeps_busy = self.forwarding.keeps_busy
        self.outputs = Outputs(self.fleet, self.runner, self.forwarding, self.keeping, self.out)
        self.ports = ports or {}
        self.queue: deque[Message] = deque()
        self.held: deque[tuple[Channel, Message]] = deque()
        self.absence = Absence()
        self._doomed: set[str] = set()
        self._asked: dict[str, int] = {}
        self._ask_status_at: float | None = None
        self._sync_at: float | None = None
        self._pump_due = False
        self._awaited: Any = None
        """The replica that ran the last cell, as another one's daemon says, while it is not connected."""
        self._handlers = {
            Client: self._client,
            FromReplica: self._from_replica,
            Output: self._output,
            Up: self._up,
            Lost: self._lost,
            Members: self._members,
            Reset: self._reset,
            Alive: self._alive,
            Subscribed: lambda event, now: self.keeping.say_busy(),
        }

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take in one event; what is to be done, in order."""
        handler: Any = self._handlers.get(type(event))
        if handler is not None:
            try:
                handler(event, now)
            except BadMessage as err:
                self.out.log(f"a message was dropped: {err}")
        if type(event) is not Output or self._pump_due:
            self._pump_due = False
            self._pump(now)
        items = self.out.take()
        self.keeping.see(items)
        # What the end of a cell calls for.
        return [*items, *self.out.take()]

    def deadline(self) -> float | None:
        """When a Tick is due at the latest."""
        alone = self.absence.answers_at if self._about_the_kernel() else None
        times = (self.runner.deadline(), self._sync_at, self._ask_status_at, alone, self.fleet.believed())
        return min((at for at in times if at is not None), default=None)

    @property
    def watched(self) -> int | None:
        """The replica whose heartbeat matters now: the executor of a running cell, or one that a cell waits for."""
        active = self.runner.active
        if active is not None and active.phase is Phase.ASKING:
            return active.election.listening
        return active.executor if active is not None and active.phase is Phase.RUNNING else None

    @property
    def doubted(self) -> Collection[int]:
        """Those whose heartbeat matters as well, and sooner: no record speaks of them any more."""
        return self.fleet.doubted

    # -- clients

    def _client(self, event: Client, now: float) -> None:
        message = event.message
        if event.channel == "stdin":
            self._stdin(message)
        elif message.msg_type == "connect_request":
            self._answer(event.channel, message, {"status": "ok", **self.ports})
        elif event.channel == "control":
            self._control(message, now)
        elif len(self.queue) + len(self.held) >= QUEUE_LIMIT:
            self.out.log(f"{message} was dropped: {QUEUE_LIMIT} messages wait already")
        elif message.subshell is not None or (message.msg_type in COMMS and self._running()):
            self.held.append(("shell", message))
        else:
            self.queue.append(message)

    def _running(self) -> bool:
        active = self.runner.active
        return active is not None and active.phase is Phase.RUNNING

    def _stdin(self, message: Message) -> None:
        replica = self.fleet.executor
        if replica in self.fleet.up and replica is not None:
            self.out.append(ToReplica(replica, "stdin", message.wire()))

    def _control(self, message: Message, now: float) -> None:
        if message.msg_type == "shutdown_request":
            restart = bool(message.content.get("restart", False))
            self._answer("control", message, {"status": "ok", "restart": restart})
            self.out.tell({"event": "shutdown_requested", "restart": restart})
        elif message.msg_type == "nbos_outputs_request":
            self.keeping.asked(message)
        elif message.msg_type == "interrupt_request":
            whose = self.runner.interrupt(now)
            if whose == "left" or (whose == "none" and self.fleet.current() is None):
                self._answer("control", message, {"status": "ok"})
            else:
                self.held.append(("control", message))
        else:
            self.held.append(("control", message))

    def _answer(self, channel: Channel, message: Message, content: dict[str, Any]) -> None:
        self.out.status("busy", message.header)
        self.out.reply(message, content, channel)
        self.out.status("idle", message.header)

    # -- the queue

    def _pump(self, now: float) -> None:
        """Move on whatever can be moved on."""
        self._passed_over()
        believed = self.fleet.believed()
        if believed is not None and now >= believed:
            members = tuple(self.fleet.members.values())
            self._members(Members(self.fleet.epoch, members, self.fleet.revision), now)
        self._ask_status(now)
        self.runner.step(now)
        replica = self.fleet.current()
        if self.absence.over(replica is None and bool(self.fleet.reasons()), now):
            self._answer_for_nobody()
        while self.held and replica is not None:
            channel, message = self.held.popleft()
            self.forwarding.send(channel, message, replica)
        while self.queue and self._next(self.queue[0], replica, now):
            replica = self.fleet.current()
        self._sync(now)

    def _about_the_kernel(self) -> list[tuple[Channel, Message]]:
        """Who asks, and waits, to learn whether there is a kernel."""
        waiting: list[tuple[Channel, Message]] = [*self.held, *(("shell", message) for message in self.queue)]
        return [(channel, message) for channel, message in waiting if message.msg_type == "kernel_info_request"]

    def _answer_for_nobody(self) -> None:
        asked = self._about_the_kernel()
        for channel, message in asked:
            self._answer(channel, message, KERNEL_INFO)
        answered = {message.msg_id for _, message in asked}
        self.held = deque(item for item in self.held if item[1].msg_id not in answered)
        self.queue = deque(message for message in self.queue if message.msg_id not in answered)

    def _next(self, head: Message, replica: int | None, now: float) -> bool:
        """Handle the head of the queue; False when it has to wait."""
        active = self.runner.active
        if head.msg_type != "execute_request":
            if replica is None or (active is not None and active.phase is not Phase.RUNNING):
                return False
            self.queue.popleft()
            self.forwarding.send("shell", head, replica)
            return True
        if active is not None:
            return False
        self.queue.popleft()
        if head.msg_id in self._doomed:
            self._doomed.discard(head.msg_id)
            self._answer("shell", head, {"status": "aborted"})
            return True
        try:
            cell = executions.cell(head, now)
        except BadMessage as err:
            self.out.log(f"{head} was dropped: {err}")
            return True
        self.keeping.begin(head)
        self.runner.start(cell, now)
        return True

    def _led(self, now: float) -> None:
        """A cell has begun to run: what its executor said before its lead was heard, and what waits to go there."""
        self._flush_comms()
        self._awaited = None
        replica = self.fleet.executor
        if replica is None:
            return
        for frames in self.fleet.released(replica):
            self._output(Output(replica, frames), now)

    def _flush_comms(self) -> None:
        """A cell has begun to run: comms that came before it was known where go there, past the queued cells."""
        replica = self.fleet.executor
        if replica is None or not self.queue:
            return
        for message in [message for message in self.queue if message.msg_type in COMMS]:
            self.queue.remove(message)
            self.forwarding.send("shell", message, replica)

    def _over(self, execution: Execution) -> None:
        if execution.cell and execution.failed and execution.stop_on_error and not execution.silent:
            self._doomed.update(m.msg_id for m in self.queue if m.msg_type == "execute_request")

    # -- between cells

    def _sync(self, now: float) -> None:
        if self.forwarding.dirty is None or self.runner.active is not None or self.queue:
            self._sync_at = None
        elif self._sync_at is None:
            self._sync_at = now + SYNC_AFTER
        elif now >= self._sync_at:
            self._sync_at = None
            if self.forwarding.open_work():
                return
            self.forwarding.dirty = None
            _, frames = self.out.signer.make("nbos_sync_request", {})
            self.runner.start(Execution(parse(frames), "sync", silent=True, started=now), now)

    def _passed_over(self) -> None:
        """Another replica runs cells now than the one with the changes made between cells: nobody stores these."""
        before, now = self.forwarding.dirty, self.fleet.executor
        if before is not None and now is not None and now != before:
            self.forwarding.dirty = None
            self.runner.notices.passed_over(self.fleet.name(before), self.fleet.name(now))
            if self.runner.active is not None and self.runner.active.cell:
                self.runner.notices.deliver(self.runner.active)

    def _ask_status(self, now: float) -> None:
        if self.runner.next_n is not None or not self.fleet.up:
            self._ask_status_at = None
            self._asked.clear()
            return
        if self._ask_status_at is None or now >= self._ask_status_at:
            self._ask_status_at = now + STATUS_PATIENCE
            self._asked.clear()
        # Whoever has come up meanwhile is asked at once: those that were asked may be gone.
        for replica in self.fleet.up - set(self._asked.values()):
            self._asked[self.out.ask(replica, "nbos_status_request", {})] = replica

    # -- replicas

    def _from_replica(self, event: FromReplica, now: float) -> None:
        message, replica = event.message, event.replica
        parent = message.parent
        if event.channel == "stdin":
            if replica == self.fleet.executor:
                self.out.append(ToClient("stdin", message.wire()))
        elif event.channel == "control" and parent.get("session") == self.out.signer.session:
            self._answered(replica, message, parent, now)
        elif event.channel == "shell" and (
            message.msg_type.startswith("nbos_") or self.runner.owns(parent.get("msg_id", ""))
        ):
            self.runner.message(replica, message, parent, now)
        else:
            self.forwarding.reply(replica, event.channel, message, parent)

    def _answered(self, replica: int, message: Message, parent: dict[str, Any], now: float) -> None:
        """A reply to one of the router's own requests."""
        if message.msg_type == "nbos_outcome_reply":
            self.runner.settling.outcome(replica, message, parent, now)
        elif message.msg_type == "nbos_status_reply" and self.runner.next_n is None:
            content = message.content
            if not isinstance(content.get("next"), int):
                return
            self._asked.clear()
            self.runner.next_n = content["next"]
            self._awaited = content.get("executor")
            self._take_up(now)

    def _take_up(self, now: float) -> None:
        """The replica that ran the last cell, or runs it still, is connected: it is the executor; what it shows, and
        has shown while there was no router, counts. Another cell that has begun to run makes that another's."""
        if self._awaited in self.fleet.up and not self._running():
            self.fleet.appoint(self._awaited)
            self.keeping.adopt(self._awaited)
            self._awaited = None

    def _output(self, event: Output, now: float) -> None:
        topic = text(event.frames[0])
        if topic == b"nbos.members":
            content = load(event.frames[6], "content") if len(event.frames) > 6 else {}
            self._pump_due = True
            self._members(members_from(content), now)
        elif self.outputs.take(event.replica, topic, event.frames, now):
            self._pump_due = True

    def _up(self, event: Up, now: float) -> None:
        self.fleet.up.add(event.replica)
        self._take_up(now)

    def _alive(self, event: Alive, now: float) -> None:
        active = self.runner.active
        if active is not None and active.phase is Phase.ASKING:
            active.election.alive(event.replica, now)

    def _lost(self, event: Lost, now: float) -> None:
        if event.replica not in self.fleet.up:
            return
        self._extend(self.fleet.lost(event.replica))
        self._asked = {msg_id: replica for msg_id, replica in self._asked.items() if replica != event.replica}
        self.out.log(f"{self.fleet.name(event.replica)} was lost: {event.reason}")
        if event.replica == self.fleet.executor:
            if self.forwarding.dirty == event.replica:
                self.forwarding.dirty = None
                self.runner.notices.unsynced(self.fleet.name(event.replica))
            self.fleet.appoint(None)
        again = self.forwarding.lost(event.replica)
        self.held.extendleft((c, m) for c, m in reversed(again) if c == "control")
        self.queue.extendleft(m for c, m in reversed(again) if c != "control")
        self.runner.lost(event.replica, event.reason, now)

    def _members(self, event: Members, now: float) -> None:
        todo, lost = self.fleet.update(event.epoch, event.members, event.revision, now)
        for index, reason in lost:
            self._lost(Lost(index, reason), now)
        self._extend(todo)

    def _reset(self, event: Reset, now: float) -> None:
        for index in sorted(self.fleet.up):
            self.forwarding.lost(index)
        self.runner.abort()
        self.keeping.forget()
        self._awaited = None
        self._doomed.update(m.msg_id for m in self.queue if m.msg_type == "execute_request")
        self.forwarding.dirty, self._sync_at = None, None
        self._extend(self.fleet.reset())

    def _extend(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            self.out.append(instruction)
