"""What a cell's bid asks of the GPUs: now, or later, when it first uses one (docs/gpus.md, "When it is touched")."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import binding, resources, sizing
from .gpu import reach
from .replica import Replica

Message = dict[str, Any]


@dataclass(frozen=True)
class Needs:
    """now: of the bid; later: what the cell will ask for when it touches a GPU, None where it asks for all it wants
    now. code: its fingerprint, '' where it must get exactly what it asks for. borrow: TPCs beyond its slice that it
    can use on loan, None where it asks for none."""

    now: Message
    later: Message | None = None
    code: str = ""
    borrow: int | None = None


NOTHING = Needs(dict(resources.NONE))


class Foresight:
    """`shell`: the IPython shell."""

    def __init__(self, shell: Any, replica: Replica) -> None:
        self._shell, self._replica = shell, replica
        self.touched = reach.Touched()

    def needs(self, parent: Message, greeting: Mapping[str, Any]) -> Needs:
        """Of an execute_request. greeting: the daemon's answer to hello. Raises BadResources."""
        code, metadata = str(parent["content"].get("code", "")), parent["metadata"]
        try:
            asked = resources.of_cell(code, metadata, greeting.get("resources") or {})
        except resources.BadResources:
            if not resources.in_first_line(code):
                raise
            return NOTHING  # the cell runs into the magic of that name, which says what is wrong
        key = sizing.key(code, metadata, asked, self._shell.user_ns)
        borrow = resources.borrow(code, metadata) if asked.get("tpcs") else None
        wants = bool(asked.get("gpus") or asked.get("tpcs"))
        if not wants or not greeting.get("touch") or resources.says(code, metadata) or self._first(parent["content"]):
            return Needs(asked, None, key, borrow)
        return Needs(dict(resources.NONE), asked, key, borrow)

    def _first(self, content: Mapping[str, Any]) -> str:
        """Why the cell must ask before it starts, '' where it need not."""
        code, replica, capture = str(content.get("code", "")), self._replica, self._replica.capture
        if code in self.touched:
            return "it used a GPU before"
        if replica.rerun.wants_gpu():
            return "a %%replay cell that runs first asks for a GPU"
        namespace = self._shell.user_ns
        on_device = capture.device_names()
        if binding.cuda_runs():
            on_device |= capture.lost.keys() & namespace.keys()  # nobody has looked into these
        expressions = map(str, (content.get("user_expressions") or {}).values())
        more = {word for unit in capture.exposed() for word in unit.mentions or ()}
        return reach.asks_first(code, expressions, namespace, on_device, replica.lazy.mentioned, more, sys.modules)
