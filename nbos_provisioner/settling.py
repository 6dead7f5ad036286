"""Settling an execution whose executor was lost: asks what became of it, and carries the verdict out.

Guarantees: one settlement at a time, each ends in one of: its replica goes on, it runs again once, or its client has
its one reply. What to ask whom, and what the answers come to, is decided in `settlement.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .election import Election
from .execution import Execution, Phase
from .messages import Message
from .outbox import error
from .settlement import Settlement, Verdict

if TYPE_CHECKING:
    from .runner import Runner


class Settling:
    """`current`: the settlement under way."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.current: Settlement | None = None

    def step(self, now: float) -> None:
        """Ask what is due."""
        if self.current is not None:
            self._ask(self.current, now)

    def wake(self) -> float | None:
        return None if self.current is None else self.current.wake(self._runner.fleet.up)

    def give_up(self, now: float) -> bool:
        """The user has interrupted a cell that waits for its lost replica: whether it was that."""
        if self.current is None:
            return False
        self.current.abandon, self.current.due = True, now
        return True

    def about(self) -> Execution | None:
        """The execution that the settlement is about."""
        if self.current is None:
            return None
        for execution in (self._runner.unsettled, self._runner.active):
            if execution is not None and execution.n == self.current.n and execution.phase is not Phase.ASKING:
                return execution
        return None

    def begin(self, execution: Execution, lost: int, reason: str, now: float) -> None:
        name = self._runner.fleet.name(lost)
        if execution.replied and execution is self._runner.active:
            self._runner.say_idle(execution)
            self._runner.finish(execution)
        over = execution.phase is Phase.OVER
        if not over:
            execution.phase = Phase.SETTLING
            if execution.led:
                self._runner.notices.lost(execution, name, reason)
        abandon = over or not execution.cell or not self._runner.rerun or execution.attempt > 1
        self.current = Settlement(execution.n, lost, reason, abandon, execution.message_session, due=now)
        self._ask(self.current, now)

    def _ask(self, settlement: Settlement, now: float) -> None:
        whom = settlement.whom(self._runner.fleet.up, now)
        if whom is not None:
            content = {"n": settlement.n, "abandon": settlement.abandon}
            settlement.asking(whom, self._runner.out.ask(whom, "nbos_outcome_request", content), now)

    def outcome(self, replica: int, message: Message, parent: dict[str, Any], now: float) -> None:
        """A daemon's word on the execution that is being settled."""
        settlement = self.current
        if settlement is None or parent.get("msg_id") != settlement.asked:
            return
        execution = self.about()
        session = str(message.header.get("session", ""))
        verdict = settlement.answer(message.content, replica, session, now)
        if execution is None:
            self.current = None
        elif verdict in (Verdict.WAIT, Verdict.ASK_AGAIN):
            if verdict is Verdict.WAIT and not settlement.told and execution is self._runner.active:
                settlement.told = True
                self._runner.notices.claimed(execution, self._runner.fleet.name(settlement.lost))
        else:
            self.current = None
            self._decided(execution, settlement, verdict, message.content, now)
        self._runner.step(now)

    def _decided(
        self,
        execution: Execution,
        settlement: Settlement,
        verdict: Verdict,
        content: dict[str, Any],
        now: float,
    ) -> None:
        name = self._runner.fleet.name(settlement.lost)
        if verdict is Verdict.RESUME:
            execution.phase = Phase.RUNNING if execution is self._runner.active else Phase.OVER
            if execution is self._runner.active:
                self._runner.fleet.appoint(settlement.lost, execution.token)
                self._runner.notices.resumed(execution, name)
                self._runner.on_executor(now)
            return
        if verdict is Verdict.RERUN:
            if execution.led:
                execution.attempt += 1
                self._runner.notices.reruns(execution, name)
                self._runner.replicating.ended(execution, f"not replicated: {name} was lost, and the cell runs again")
            execution.phase, execution.election = Phase.ASKING, Election(opened=True)
            self._runner.next_n = execution.n
            return
        self._runner.next_n = max(self._runner.next_n or 0, execution.n + 1)
        execution.committed = True
        if verdict is Verdict.ABANDONED:
            self._runner.replicating.ended(execution, f"not replicated: {name} was lost before that was done")
        self._runner.replicating.committed(execution, now)
        if execution is self._runner.unsettled:
            self._runner.unsettled = None
            if verdict is Verdict.ABANDONED:
                self._runner.notices.later(execution, name, str(content.get("reason") or settlement.reason))
                following = self._runner.active
                if following is not None and following.cell:
                    # It waits for this verdict; in the output of a later one, "the previous cell" would be another.
                    self._runner.notices.deliver(following)
            return
        ending = _ending(verdict, content, name, settlement.reason, execution.led)
        execution.led = False
        self._runner.conclude(execution, ending)


def _ending(verdict: Verdict, content: dict[str, Any], name: str, reason: str, led: bool) -> dict[str, Any]:
    """The reply to a cell whose executor is gone."""
    if verdict is Verdict.ABANDONED:
        why = str(content.get("reason") or reason)
        return error(
            "NBOSReplicaDied",
            f"{name} died while this cell ran: {why}. The variables are as they were before this cell.",
        )
    if not led:
        # Its lead was never heard: what is committed under this number may be another server's cell.
        return error("NBOSReplyLost", f"{name} was lost as this cell began; see whether it ran, else run it again")
    if content.get("status") == "error":
        return error("NBOSReplyLost", f"the cell raised an error; its traceback was lost with {name}")
    count = content.get("execution_count", 0)
    return {"status": "ok", "execution_count": count, "user_expressions": {}, "payload": []}
