"""What users see of a replication that takes long, in the output of the cell that caused it: how far it is, its end.

Guarantees: one display for each cell, made when its replica first speaks of it and ended once: when its entry is in the
log, or with what became of it instead. A silent cell and a sync show nothing. The text comes from the current executor
under its current token; when it was lost, nobody else's word keeps the display moving.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from .execution import Execution
from .outbox import Outbox

LONGEST = 1000
"""Characters of a replica's text that are shown."""


@dataclass
class _Shown:
    header: dict[str, Any]
    display: str
    text: str
    what: str
    began: float


class Replicating:
    def __init__(self, out: Outbox) -> None:
        self._out = out
        self._shown: dict[str, _Shown] = {}

    def heard(self, execution: Execution, content: dict[str, Any], now: float) -> None:
        """The executor of `execution` tells how far it is: content of nbos_progress."""
        if not execution.cell or execution.silent or execution.committed:
            return
        text = f"NBOS: {str(content.get('text', ''))[:LONGEST]}"
        shown = self._shown.get(execution.msg_id)
        if shown is None:
            seconds = content.get("seconds")
            began = now - (seconds if isinstance(seconds, int | float) else 0.0)
            shown = _Shown(execution.message.header, f"nbos-{uuid.uuid4().hex}", text, "", began)
            self._shown[execution.msg_id] = shown
            self._publish("display_data", shown)
        elif text != shown.text:
            shown.text = text
            self._publish("update_display_data", shown)
        shown.what = str(content.get("what", ""))[:LONGEST]

    def committed(self, execution: Execution, now: float) -> None:
        shown = self._shown.get(execution.msg_id)
        if shown is not None:
            what = shown.what or "what this cell changed"
            self._end(execution.msg_id, f"replicated {what} in {now - shown.began:.1f} s")

    def ended(self, execution: Execution, text: str) -> None:
        """It did not come to its end."""
        self._end(execution.msg_id, text)

    def forget(self) -> None:
        """The kernel is restarted."""
        for msg_id in list(self._shown):
            self._end(msg_id, "the kernel was restarted before this cell's changes were stored")

    def _end(self, msg_id: str, text: str) -> None:
        shown = self._shown.pop(msg_id, None)
        if shown is not None:
            shown.text = f"NBOS: {text}"
            self._publish("update_display_data", shown)

    def _publish(self, kind: str, shown: _Shown) -> None:
        content = {
            "data": {"text/plain": shown.text},
            "metadata": {},
            "transient": {"display_id": shown.display},
        }
        self._out.publish(kind, content, shown.header, kind.encode())
