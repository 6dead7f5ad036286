"""An executor and a standby in one process: two IPython shells, with the log between them as JSON and bytes."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from traitlets.config import Config

from nbos_cluster import content
from nbos_kernel import resources
from nbos_kernel.capture.unloaded import OFF
from nbos_kernel.entries import Layout
from nbos_kernel.replay import hush, marking
from nbos_kernel.replica import Replica
from nbos_kernel.settings import RecordingShell

LOG = logging.getLogger("test")


class Side:
    """One replica's shell and its copy of the state."""

    def __init__(self, blobs: dict[str, bytes], lazy: int = OFF) -> None:
        config = Config()
        config.HistoryManager.enabled = False
        self.shell = RecordingShell(config=config)
        # Thousands of shells are made in a run of the tests; each would be kept, and collect garbage, at the exit.
        atexit.unregister(self.shell.atexit_operations)
        self.blobs = blobs
        self.replica = Replica(self.shell, self._read, LOG)
        self.shell.settings = self.replica.settings
        self.shell.displayhook.write_format_data = lambda *_: None
        self.shell.displayhook.write_output_prompt = lambda: None
        marking.install(self.shell, self.replica.records)
        self.replica.leave_unloaded(lazy)

    async def _read(self, hashes: Sequence[str], target: memoryview, chunk: int) -> int:
        data = b"".join(self.blobs[digest] for digest in hashes)
        target[: len(data)] = data
        return len(data)

    @property
    def ns(self) -> dict[str, Any]:
        return self.shell.user_ns

    def run(self, code: str) -> Any:
        self.shell.builtin_trap  # noqa: B018 - instantiated lazily
        self.replica.lazy.before(code)
        result = self.shell.run_cell(code, store_history=True)
        return result

    def takes_over(self, needs: dict[str, Any], tell: Any) -> None:
        """What happens between the claim and the cell: a look into what was loaded; replays, where any are due."""
        for _ in self.replica.capture.look_ahead():
            pass
        asyncio.run(self.replica.rerun.before_cell(needs, self._run_again, tell))

    async def _run_again(self, code: str) -> BaseException | None:
        return await hush.run(self.shell, code, nullcontext)

    def eval(self, expression: str) -> Any:
        return eval(expression, self.ns)


class Pair:
    """`cell` runs on the executor and replicates; `switch` makes the standby the executor."""

    def __init__(self, lazy: int = OFF) -> None:
        self.blobs: dict[str, bytes] = {}
        self.executor, self.standby = Side(self.blobs, lazy), Side(self.blobs, lazy)
        self.n = 0
        self.payload = b""
        self.notices: list[str] = []
        self.told: list[str] = []
        self.entries: list[dict[str, Any]] = []

    def cell(self, code: str, needs: dict[str, Any] = resources.NONE) -> dict[str, Any]:
        """Run, capture, send through JSON, apply. Returns the entry."""
        replica = self.executor.replica
        self.told = []
        self.executor.takes_over(needs, self.told.append)
        replica.records.begin(code)
        succeeded = bool(self.executor.run(code).success)
        self.n += 1
        taken = replica.take_changes(code, succeeded, needs)
        found, self.notices = taken.changes, taken.notices
        layout = Layout(found.components)
        for _, chunk, data in layout.blobs(found.components):
            chunk.address = chunk.address or content.address(data)
            self.blobs[chunk.address] = bytes(data)
        components, payload = layout.encode(found.components)
        entry = {
            "n": self.n,
            "kind": "cell",
            "status": "ok",
            "execution_count": replica.history.last(),
            "source": code,
            "components": components,
            "deleted": found.deleted,
            "lost": found.lost,
            "effects": taken.effects,
        }
        self.payload = payload
        replica.own(self.n)
        del found, layout
        for _ in replica.capture.settle():
            pass
        message = json.loads(json.dumps({"type": "entry", "entry": entry}))
        self.standby.replica.arrived(message, payload)
        asyncio.run(self.standby.replica.catch_up(lambda n, lost: None))
        self.entries.append(entry)
        return entry

    def switch(self) -> None:
        self.executor, self.standby = self.standby, self.executor

    def on_standby(self, expression: str) -> Any:
        return self.standby.eval(expression)
