"""What the router tells the user in a cell's output: why it waits, that its replica was lost, what became of it."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any

from . import granted
from .execution import Execution
from .messages import BadMessage, Message
from .outbox import Outbox

NOBODY = 1.0
"""Seconds a cell waits for any replica before its output says so."""

LINE_AFTER = 2.0
"""Seconds a cell waits for a GPU, at least, for a line under it that says what it got and used."""


class Notices:
    """line_after: as LINE_AFTER."""

    def __init__(self, out: Outbox, line_after: float = LINE_AFTER) -> None:
        self.out = out
        self._line_after = line_after
        self._later: list[str] = []

    def deliver(self, execution: Execution) -> None:
        """Say in this cell's output what happened to earlier ones after their end."""
        if not execution.silent:
            for text in self._later:
                self.out.note(text, execution.message.header)
            self._later.clear()

    def forget(self) -> None:
        self._later.clear()

    def add(self, text: str) -> None:
        self._later.append(text)

    def unsynced(self, name: str) -> None:
        self.add(
            f"{name} was lost before changes made between cells (widgets, subshells, the debugger) were stored; "
            "variables they changed are as they were before"
        )

    def passed_over(self, name: str, now: str) -> None:
        self.add(
            f"{now} has taken over from {name} before changes made between cells (widgets, subshells, the debugger) "
            "were stored; variables they changed are as they were before"
        )

    def waits(self, execution: Execution, content: dict[str, Any]) -> None:
        """Show or update why a cell waits: content of nbos_waiting."""
        text = f"waiting: {content.get('reason') or 'nobody can run this cell now'}"
        if isinstance(content.get("position"), int):
            text += f" (position {content['position']} of {content.get('of', content['position'])}"
            text += f" on {content['host']})" if content.get("host") else ")"
        if isinstance(content.get("estimate"), int | float) and content["estimate"] >= 0:
            text += f", about {content['estimate']:.0f} s"
        self._show(execution, f"NBOS: {text}; interrupt the cell to leave the queue")

    def nobody(self, execution: Execution, reachable: bool, reasons: Collection[str], before: str, now: float) -> None:
        """Say what a cell waits for when no replica has said it. reasons: what the members' daemons say where none is
        reachable (an image on its way, or missing, …). before: what the executor still has to do, in words."""
        if not execution.cell or execution.led or now < execution.started + NOBODY:
            return
        if not reachable and (reasons or not execution.display):
            why = f" ({'; '.join(reasons)})" if reasons else ""
            self._show(execution, f"NBOS: waiting: no replica of this kernel can be reached{why}; interrupt to give up")
        elif reachable and before and not execution.display:
            self.waits(execution, {"reason": before})

    def queued(self, execution: Execution, content: dict[str, Any], now: float) -> None:
        """It has a place in a host's queue: content of nbos_waiting."""
        if execution.queued is None and isinstance(content.get("position"), int):
            execution.queued = now

    def runs(self, execution: Execution, name: str, grant: Any, now: float) -> None:
        """It has waited and runs; one that waited long for a GPU says at its end what it used (`ran`)."""
        if execution.got:  # another replica, which waited as well, has it after the first one was lost
            self._ended(execution, "was lost with it")
        if not execution.display:
            return
        waited = now - (execution.queued if execution.queued is not None else now)
        got = granted.describe(grant)
        if got and waited >= self._line_after:
            execution.got, execution.got_at, execution.waited = f"{got} on {name}", now, waited
            self._show(execution, f"NBOS: waited {waited:.1f} s for a GPU, got {execution.got}")
            return
        self._show(execution, f"NBOS: waited {now - execution.started:.1f} s, runs on {name}")
        execution.display = ""

    def touched(self, execution: Execution, content: dict[str, Any], name: str, now: float) -> None:
        """It runs, and needs a GPU on its way: content of nbos_touch."""
        state = content.get("state")
        if state == "waiting":
            self.queued(execution, content, now)
            self.waits(execution, content)
            return
        waited = now - (execution.queued if execution.queued is not None else now)
        execution.queued, got = None, granted.describe(content.get("grant"))
        if not execution.display:
            return
        if state != "granted" or not got:
            self._left(execution, f" after {waited:.1f} s")
        elif waited >= self._line_after:
            execution.got, execution.got_at, execution.waited = f"{got} on {name}", now, waited
            self._show(execution, f"NBOS: waited {waited:.1f} s for a GPU, got {execution.got}")
        else:
            self._show(execution, f"NBOS: waited {waited:.1f} s, got {got} on {name}")
            execution.display = ""

    def _left(self, execution: Execution, when: str) -> None:
        self._show(execution, f"NBOS: left the queue{when}")
        execution.display = ""

    def ran(self, execution: Execution, reply: Message, now: float) -> None:
        """Its reply has come, which says what it used of the GPUs."""
        if not execution.got:
            if execution.display:  # a thread of it still waited
                self._left(execution, " as the cell ended")
            return
        try:
            held = granted.used(reply.metadata.get("nbos_used"))
        except BadMessage:  # the client is given the reply all the same
            held = ""
        self._ended(execution, held or f"held it for {now - execution.got_at:.1f} s")

    def _ended(self, execution: Execution, how: str) -> None:
        self._show(execution, f"NBOS: waited {execution.waited:.1f} s for a GPU, got {execution.got}, {how}")
        execution.got = execution.display = ""

    def clear(self, execution: Execution) -> None:
        """It ends without a reply of its replica."""
        if execution.got:
            self._ended(execution, "was lost with it")
        elif execution.display:
            self._show(execution, "")
            execution.display = ""

    def _show(self, execution: Execution, text: str) -> None:
        if execution.silent or not execution.cell or text == execution.shown:
            return
        execution.shown = text
        kind = "update_display_data" if execution.display else "display_data"
        execution.display = execution.display or f"nbos-{uuid.uuid4().hex}"
        content = {
            "data": {"text/plain": text},
            "metadata": {},
            "transient": {"display_id": execution.display},
        }
        self.out.publish(kind, content, execution.message.header, kind.encode())

    def lost(self, execution: Execution, name: str, reason: str) -> None:
        self._note(execution, f"{name} was lost while this cell ran ({reason}); asking what became of it")

    def undebugged(self, execution: Execution, name: str, now: str) -> None:
        self._note(execution, f"the debugger was attached to {name}, this cell runs on {now}: start debugging again")

    def claimed(self, execution: Execution, name: str) -> None:
        self._note(execution, f"{name} still holds this cell; waiting until it comes back or its claim ends")

    def resumed(self, execution: Execution, name: str) -> None:
        self._note(execution, f"{name} is back and has gone on with this cell; output in between may be missing")

    def reruns(self, execution: Execution, name: str) -> None:
        if execution.got:
            self._ended(execution, "was lost with it")
        execution.queued = None
        self._note(execution, f"{name} is gone; the cell runs again from its beginning on another replica")

    def later(self, execution: Execution, name: str, reason: str) -> None:
        what = "the changes of the previous cell" if execution.cell else "changes made between cells"
        self.add(
            f"{name} was lost before {what} were stored ({reason}); the variables are as they were before. "
            "Run it again if you need it"
        )

    def _note(self, execution: Execution, text: str) -> None:
        self.out.log(f"execution {execution.n}: {text}")
        if execution.cell and not execution.silent:
            self.out.note(text, execution.message.header)
