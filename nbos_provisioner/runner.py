"""The numbered executions: who runs the next one, its answers to the client, and what happens when its
executor is lost.

Guarantees: one execution at a time; each cell gets exactly one busy, one reply and one idle, whatever the replicas do;
a lead for an older token, a second reply, and anything of a replica that is not the executor change nothing.
`active` is the execution in hand; `unsettled` one that was answered, but whose entry is not known to be in the log.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

from nbos_cluster.kept import Bounds

from .election import DEBUGGED, SILENCE, SUBSHELLS, Election
from .execution import Execution, Phase
from .fleet import Fleet
from .instructions import ToClient, ToReplica
from .messages import Message
from .notices import LINE_AFTER, NOBODY, Notices
from .outbox import Outbox, error
from .replicating import LONGEST, Replicating
from .settling import Settling

IDLE_PATIENCE = 10.0
"""Seconds after its reply in which an execution's idle is awaited from its executor; then the router says it."""

SYNC_PATIENCE = 1.0
SYNC_TRIES = 8
REMEMBERED = 512


class Runner:
    def __init__(
        self,
        fleet: Fleet,
        out: Outbox,
        *,
        rerun: bool = True,
        keep: Bounds | None = None,
        line_after: float = LINE_AFTER,
    ) -> None:
        self.fleet = fleet
        self._keep = {"keep": [keep.size, keep.messages]} if keep is not None and keep.size else {}
        self.out = out
        self.rerun = rerun
        self.notices = Notices(out, line_after)
        self.replicating = Replicating(out)
        self.active: Execution | None = None
        self.unsettled: Execution | None = None
        self.settling = Settling(self)
        self.next_n: int | None = None
        self.on_over: Callable[[Execution], None] = lambda execution: None
        self.on_executor: Callable[[float], None] = lambda now: None
        self.keeps_busy: Callable[[int], bool] = lambda replica: False
        """Whether a replica's main thread has something to do that is no cell."""
        self._asks = 0
        self._closed: OrderedDict[str, int] = OrderedDict()
        self._left: dict[str, int] = {}

    # -- starting and asking

    def start(self, execution: Execution, now: float) -> None:
        """Take `execution` in hand. There must be none."""
        assert self.active is None, (self.active, execution)
        self.active = execution
        if execution.cell:
            self.out.status("busy", execution.message.header)
            self.notices.deliver(execution)
        self.step(now)

    def step(self, now: float) -> None:
        """Do what is due for the settlement and the execution in hand."""
        self.settling.step(now)
        execution = self.active
        if execution is None:
            return
        if execution.phase is Phase.ASKING:
            self._step_election(execution, now)
        if execution.replied and execution.idle_by is not None and now >= execution.idle_by:
            self.say_idle(execution)
            self.finish(execution)

    def _step_election(self, execution: Execution, now: float) -> None:
        reachable = bool(self.fleet.up) and self.next_n is not None
        reasons = () if self.fleet.up else self.fleet.reasons()
        self.notices.nobody(execution, reachable, reasons, self._before(), now)
        if self.next_n is None or (self.settling.current is not None and self.settling.about() is self.unsettled):
            return
        if execution.n != self.next_n:
            execution.n, execution.election = self.next_n, Election()
        current = self.fleet.current()
        up = self.fleet.candidates() if execution.cell else {current} & self.fleet.up
        if not execution.cell and (execution.tries > SYNC_TRIES or now > execution.started + SYNC_PATIENCE):
            return self._drop_sync(execution)
        if current is not None and self.keeps_busy(current):
            execution.election.excuse(current, now + SILENCE)
        if self.fleet.debugged is not None and self.fleet.debugged == current:
            execution.election.patience = DEBUGGED
        elif current in self.fleet.subshells.values():
            execution.election.patience = SUBSHELLS
        preferred = current if current in up else self.fleet.best()
        step = execution.election.step(up, preferred, now, self.fleet.absent())  # type: ignore[arg-type]
        execution.wake = step.wake
        for replica, wait in step.asks:
            self._ask(execution, replica, wait)
        if step.shown:
            self.notices.waits(execution, {"reason": step.shown})
        if step.impossible:
            self.conclude(execution, error("NBOSResourceError", step.impossible))

    def _ask(self, execution: Execution, replica: int, wait: bool) -> None:
        # Every question differs from the last: a replica's Session drops a signature that it has seen.
        self._asks += 1
        execution.tries += 1
        order = {"n": execution.n, "attempt": execution.attempt, "wait": wait, "ask": self._asks, **self._keep}
        frames = self.out.signer.with_metadata(execution.message, {"nbos_execution": order})
        self.out.append(ToReplica(replica, "shell", frames))

    def _drop_sync(self, execution: Execution) -> None:
        self.out.log(f"sync {execution.n} was not taken; the next execution replicates what it would have")
        execution.phase = Phase.OVER
        self.active = None
        self.on_over(execution)

    def asking(self, replica: int) -> bool:
        """Whether `replica` may become the executor by a lead, or a settlement, that is on its way."""
        active = self.active
        if active is None or not active.cell or active.phase not in (Phase.ASKING, Phase.SETTLING):
            return False
        if replica in active.election.asks:
            return True
        settlement = self.settling.current
        return active.phase is Phase.SETTLING and settlement is not None and settlement.lost == replica

    # -- what replicas say

    def owns(self, msg_id: str) -> bool:
        """Whether `msg_id` is an execution of this machine's (now, or not long ago)."""
        active, unsettled = self.active, self.unsettled
        return (
            (active is not None and active.msg_id == msg_id)
            or (unsettled is not None and unsettled.msg_id == msg_id)
            or msg_id in self._closed
        )

    def message(self, replica: int, message: Message, parent: dict[str, Any], now: float) -> None:
        """An execute_reply, or one of the nbos_ messages on shell."""
        active = self.active
        mine = active if active is not None and active.msg_id == parent.get("msg_id") else None
        kind = message.msg_type
        if kind == "execute_reply":
            if mine is not None and mine.phase is Phase.RUNNING and replica == mine.executor:
                self._replied(mine, message, now)
        elif kind == "nbos_lead":
            self._lead(replica, message, mine, parent, now)
        elif kind == "nbos_yield" and mine is not None:
            self._yielded(mine, replica, message.content, now)
        elif kind == "nbos_waiting" and mine is not None:
            self._waiting(mine, replica, message.content, now)
        elif kind in ("nbos_committed", "nbos_failed"):
            self._ended(replica, kind, message.content, parent, now)

    def _lead(self, replica: int, message: Message, mine: Execution | None, parent: dict[str, Any], now: float) -> None:
        n, token = int(message.content.get("n", -1)), int(message.content.get("token", -1))
        if mine is None or mine.phase is Phase.OVER:
            return self._late_lead(replica, n, parent)
        if n != mine.n or (mine.led and token <= mine.token) or mine.replied:
            return self.out.log(f"lead of {self.fleet.name(replica)} for {n} under {token} comes too late")
        for other in mine.election.open_asks():
            if other != replica:
                self.out.ask(other, "nbos_cancel_request", {"n": n, "msg_id": mine.msg_id})
        self.unsettled = None if self.unsettled is not self.settling.about() else self.unsettled
        mine.led, mine.executor, mine.token, mine.wake = True, replica, token, None
        mine.phase = Phase.RUNNING
        if self.settling.about() is mine:
            self.settling.current = None
        mine.message_session = message.header.get("session", "")
        self.next_n = n + 1
        self.fleet.appoint(replica, token)
        if not mine.cell:
            return self.finish(mine)
        self.notices.runs(mine, self.fleet.name(replica), message.content.get("grant"), now)
        if self.fleet.debugged is not None and self.fleet.debugged != replica:
            self.notices.undebugged(mine, self.fleet.name(self.fleet.debugged), self.fleet.name(replica))
            self.fleet.debugged = None
        self.on_executor(now)

    def _late_lead(self, replica: int, n: int, parent: dict[str, Any]) -> None:
        """A lead for an execution that has left: when its user interrupted it, it must not run on unseen."""
        if parent.get("msg_id") in self._left:
            self.out.ask(replica, "interrupt_request", {})
        elif parent.get("msg_type") != "nbos_sync_request":
            return
        if self.next_n is not None:
            self.next_n = max(self.next_n, n + 1)

    def _yielded(self, mine: Execution, replica: int, content: dict[str, Any], now: float) -> None:
        code, reason = str(content.get("code", "")), str(content.get("reason", ""))
        if mine.phase is not Phase.ASKING or content.get("n") != mine.n:
            return
        if content.get("everywhere"):
            return self.conclude(mine, error("NBOSResourceError", reason))
        following = content.get("next") if isinstance(content.get("next"), int) else None
        mine.election.answer(replica, code, reason, following)
        decided = code == "stale" and (mine.led or bool(mine.election.unknown))
        if decided or (code == "taken" and mine.election.unknown):
            lost = mine.executor if mine.led else min(mine.election.unknown)
            return self.settling.begin(mine, lost if lost is not None else -1, "it was lost as it was asked", now)
        taken = mine.election.passed(mine.n)
        if taken is not None:
            self.next_n = taken
        elif code == "behind" and self.unsettled is None:
            self.next_n = mine.election.too_high(mine.n) or self.next_n
        self._step_election(mine, now)

    def _waiting(self, mine: Execution, replica: int, content: dict[str, Any], now: float) -> None:
        if mine.phase is Phase.ASKING and content.get("n") == mine.n:
            mine.election.waits(replica, str(content.get("reason", "")))
            self.notices.queued(mine, content, now)
            self.notices.waits(mine, content)

    def _ended(self, replica: int, kind: str, content: dict[str, Any], parent: dict[str, Any], now: float) -> None:
        for execution in (self.unsettled, self.active):
            if execution is None or execution.msg_id != parent.get("msg_id"):
                continue
            if execution.phase is Phase.ASKING and not execution.cell:
                return self.finish(execution)  # nothing had changed: no number was needed
            if execution.executor != replica:
                continue
            if kind == "nbos_failed":
                reason = str(content.get("reason", "its claim was lost"))
                return self.settling.begin(execution, replica, reason, now)
            if execution.phase is Phase.RUNNING and not execution.replied and content.get("reply") != "follows":
                return self.settling.begin(execution, replica, "its reply was lost", now)
            execution.committed = True
            self.replicating.committed(execution, now)
            if execution is self.unsettled:
                if self.settling.about() is execution:
                    self.settling.current = None
                self.unsettled = None

    def progress(self, parent: dict[str, Any], content: dict[str, Any], now: float) -> bool:
        """The executor tells how far it is with what an execution changed; a cell that waits for that shows it too.

        True when a cell came to its end by it: its outputs have come before this, and its replica is busy for long, so
        that its idle is said for it; the next cell can then say what it waits for.
        """
        mine = next((e for e in (self.unsettled, self.active) if e and e.msg_id == parent.get("msg_id")), None)
        if mine is None or mine.committed:
            return False
        self.replicating.heard(mine, content, now)
        active = self.active
        if active is not None and active is not mine and active.phase is Phase.ASKING:
            self.notices.waits(active, {"reason": str(content.get("text", ""))[:LONGEST]})
        if mine is not active or not mine.replied:
            return False
        self.say_idle(mine)
        self.finish(mine)
        return True

    def touched(self, replica: int, parent: dict[str, Any], content: dict[str, Any], now: float) -> None:
        """The cell runs, and asks for a GPU only now: it waits, has got it, or left the queue."""
        mine = self.active
        if mine is None or mine.msg_id != parent.get("msg_id") or mine.executor != replica:
            return
        if mine.phase is Phase.RUNNING and not mine.replied:
            self.notices.touched(mine, content, self.fleet.name(replica), now)

    # -- the client's view

    def _replied(self, execution: Execution, message: Message, now: float) -> None:
        if execution.replied:
            return
        execution.failed = message.content.get("status") == "error"
        self.notices.ran(execution, message, now)
        self.out.append(ToClient("shell", message.wire()))
        execution.replied, execution.idle_by = True, now + IDLE_PATIENCE
        self.on_over(execution)
        if execution.idle:
            self.finish(execution)

    def idle(self, replica: int, msg_id: str) -> bool:
        """The executor has said idle for `msg_id`: whether to pass it on."""
        execution = self.active
        if execution is None or execution.msg_id != msg_id or execution.idle:
            return False
        if execution.phase is not Phase.RUNNING or execution.executor != replica:
            return False
        execution.idle = True
        return True

    def after_idle(self, msg_id: str) -> None:
        execution = self.active
        if execution is not None and execution.msg_id == msg_id and execution.idle and execution.replied:
            self.finish(execution)

    def _before(self) -> str:
        """What the executor has to do before it can run the next cell, in words; '' when nothing is known."""
        if self.unsettled is not None and self.settling.current is None:
            return "what the cell before has changed is being captured and stored"
        current = self.fleet.executor
        if current is not None and self.keeps_busy(current):
            return f"{self.fleet.name(current)} still runs what a widget (a comm) asked for"
        if current is not None and self.active is not None and self.active.election.listening == current:
            return f"{self.fleet.name(current)} is busy: it is alive, and has not come to this cell yet"
        return ""

    def deadline(self) -> float | None:
        """When `step` has something to do at the latest."""
        times = [self.settling.wake()]
        if self.active is not None:
            execution = self.active
            times += [execution.wake if execution.phase is Phase.ASKING else None, execution.idle_by]
            shows = execution.cell and not execution.silent and not execution.display
            if execution.phase is Phase.ASKING and shows and (not self.fleet.up or self._before()):
                times.append(execution.started + NOBODY)
        return min((at for at in times if at is not None), default=None)

    def say_idle(self, execution: Execution) -> None:
        if not execution.idle:
            execution.idle = True
            self.out.status("idle", execution.message.header)

    def conclude(self, execution: Execution, content: dict[str, Any]) -> None:
        """Answer a cell in the replica's stead, and be done with it."""
        self.notices.clear(execution)
        if not execution.cell:
            return self.finish(execution)
        if not execution.replied:
            if content["status"] == "error":
                execution.failed = True
                shown = {key: content[key] for key in ("ename", "evalue", "traceback")}
                self.out.publish("error", shown, execution.message.header)
            self.out.reply(execution.message, content)
            execution.replied = True
            self.on_over(execution)
        self.say_idle(execution)
        self.finish(execution)

    def finish(self, execution: Execution) -> None:
        execution.phase = Phase.OVER
        self._closed[execution.msg_id] = execution.n
        if len(self._closed) > REMEMBERED:
            self._closed.popitem(last=False)
        if execution.led and not execution.committed:
            self.unsettled = execution
        if self.active is execution:
            self.active = None
        if not execution.cell:
            self.on_over(execution)

    # -- interrupts, losses, restarts

    def interrupt(self, now: float) -> Literal["executor", "left", "none"]:
        """Who has to do with an interrupt: the executor, nobody any more (the cell has left), or no cell at all."""
        execution = self.active
        if execution is None or not execution.cell:
            return "none"
        if execution.phase is Phase.RUNNING:
            return "executor"
        self._left[execution.msg_id] = execution.n
        if len(self._left) > REMEMBERED:
            self._left.pop(next(iter(self._left)))
        for replica in execution.election.open_asks():
            self.out.ask(replica, "nbos_cancel_request", {"n": execution.n, "msg_id": execution.msg_id})
        lost = execution.phase is Phase.SETTLING and self.settling.give_up(now)
        if lost:
            execution.led = True
        why = "interrupted while it waited for its lost replica" if lost else "the cell left the queue"
        self.conclude(execution, error("KeyboardInterrupt", why))
        return "left"

    def lost(self, replica: int, reason: str, now: float) -> None:
        """A replica's connection is gone."""
        for execution in (self.unsettled, self.active):
            if execution is None or self.settling.about() is execution:
                continue
            if execution.phase is Phase.ASKING:
                execution.election.lost(replica)
            elif execution.executor == replica and not (execution.committed and execution.replied):
                self.settling.begin(execution, replica, reason, now)
        self.step(now)

    def abort(self) -> None:
        """The kernel is restarted: whatever waits for it is answered."""
        if self.active is not None:
            execution = self.active
            execution.led = False
            if execution.cell:
                self.conclude(execution, error("NBOSKernelRestarted", "the kernel was restarted"))
            else:
                self._drop_sync(execution)
        self.unsettled = self.settling.current = self.next_n = None
        self.notices.forget()
        self.replicating.forget()
