"""Runs one kernel's router process for the provisioner, and starts it again, with the same ports, should it die.

Guarantees: the router's ip and ports never change once they are known; keys go over its stdin; it ends with this
process at the latest, because its stdin closes then.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from typing import Any

from .spare_router import end_router, start_router

START_PATIENCE = 20.0
RESTARTS, WITHIN = 5, 60.0
"""A router that dies more often than this is not started again."""


class RouterFailed(RuntimeError):
    """The router could not be started; says why."""


class RouterProcess:
    """start: gives a process that waits for its configuration."""

    def __init__(
        self,
        log: logging.Logger,
        on_event: Callable[[dict[str, Any]], None],
        start: Callable[[], Awaitable[Process]] = start_router,
    ) -> None:
        self.log = log
        self.on_event = on_event
        self._start = start
        self.ports: dict[str, int] = {}
        self.pid = 0
        self.failed = False
        self._process: Process | None = None
        self._config: dict[str, Any] = {}
        self._members: dict[str, Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._deaths: list[float] = []

    async def spawn(self) -> None:
        """Have the process; it waits for its configuration, so this needs no key yet."""
        self._process = await self._start()
        self.pid = self._process.pid

    async def configure(self, config: dict[str, Any]) -> None:
        """Give it keys, and wait until it listens. Raises RouterFailed."""
        self._config = config
        self._ready = asyncio.get_running_loop().create_future()
        self._write({**config, "ports": self.ports or None})
        self._task = self._task or asyncio.create_task(self._attend())
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), START_PATIENCE)
        except TimeoutError as err:
            raise RouterFailed(f"the router (pid {self.pid}) did not start within {START_PATIENCE:.0f} s") from err

    def members(self, model: dict[str, Any]) -> None:
        """Tell it the members that the gateway reported."""
        self._members = {"epoch": model.get("epoch", 0), "members": model.get("members", [])}
        self._write({"command": "members", **self._members})

    def reset(self) -> None:
        """The kernel is restarted: forget replicas and queues, keep the ports."""
        self._members = None
        self._write({"command": "reset"})

    async def close(self) -> None:
        """End it; its replicas live on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        process = self._process
        if process is None:
            return
        await end_router(process)
        self._process = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(line).encode() + b"\n")

    async def _attend(self) -> None:
        """Read its events; start it again when it dies."""
        while True:
            assert self._process is not None
            assert self._process.stdout is not None
            async for line in self._process.stdout:
                self._heard(json.loads(line))
            code = await self._process.wait()
            self._deaths = [at for at in self._deaths if at > time.monotonic() - WITHIN] + [time.monotonic()]
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(RouterFailed(f"the router ended at its start with code {code}"))
                return
            if len(self._deaths) > RESTARTS:
                self.log.error("the router died %d times in a minute; the kernel is given up", len(self._deaths))
                self.failed = True
                return
            self.log.error("the router (pid %d) died with code %s; starting it again", self.pid, code)
            await self.spawn()
            self._write({**self._config, "ports": self.ports})
            if self._members is not None:
                self._write({"command": "members", **self._members})

    def _heard(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self.ports = dict(event["ports"])
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif event["event"] == "failed":
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(RouterFailed(str(event["reason"])))
            self.log.error("the router failed: %s", event["reason"])
        else:
            self.on_event(event)
