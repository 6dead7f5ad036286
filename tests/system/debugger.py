"""The debugger's front end, as JupyterLab is one: debug requests on control, events on iopub."""

from __future__ import annotations

from typing import Any

from tests.system.channels import Channels
from tests.system.hubclient import eventually
from tests.system.messages import Json, Message


class Debugger:
    """Call it with a command and its arguments; the reply's body. A request that fails is an AssertionError."""

    def __init__(self, channels: Channels) -> None:
        self.channels, self.seq = channels, 0

    async def __call__(self, command: str, **arguments: Any) -> Json:
        self.seq += 1
        content = {"type": "request", "seq": self.seq, "command": command, "arguments": arguments}
        reply = await self.channels.request("debug_request", content, channel="control")
        assert reply.get("success"), (command, reply)
        return dict(reply.get("body") or {})

    async def event(self, name: str) -> Json:
        async def seen() -> Message | None:
            found = [m for m in self.channels.published() if m.type == "debug_event" and m.content["event"] == name]
            return found[-1] if found else None

        return (await eventually(seen, f"debug event {name}", 15)).content
