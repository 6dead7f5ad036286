"""Checkpoints of this host's processes: the helper started and asked, each step of `process` carried out.

Guarantees: every wait is bounded; where the helper hangs or ends, the process counts as failed, which its daemon then
ends, and another helper is started for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from gpu_daemon.checkpoint.driver import REMAPS
from gpu_daemon.checkpoint.process import Aim, Process

COMMAND = (sys.executable, "-m", "gpu_daemon.checkpoint.helper")
START_WITHIN = 60.0
TRIES = 2
HUNG = "the driver did not"
LOCK_WITHIN = 10.0
STEP_WITHIN = 300.0
"""Seconds for 140 GB at the slowest that is reported (3 GB/s), and as much again."""


class HelperGone(Exception):
    """The helper does not answer, or cannot be had; says why."""


class Hung(HelperGone):
    """The driver did not carry out this very step in time."""


class Checkpoints:
    """One host's."""

    def __init__(self, command: Sequence[str] = COMMAND, step_within: float = STEP_WITHIN) -> None:
        self._command, self._step_within = command, step_within
        self._helper: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.version = 0
        """CUDA's, of the driver; 0 until it was asked."""

    @property
    def remaps(self) -> bool:
        """Whether a process can be restored onto another GPU of the same model."""
        return self.version >= REMAPS

    async def open(self) -> str:
        """Start the helper. Why processes cannot be checkpointed here, '' where they can."""
        try:
            await self._ready()
        except HelperGone as err:
            return str(err)
        return ""

    async def close(self) -> None:
        await self._drop("the daemon ends")

    async def bring(self, pid: int, aim: Aim, pairs: Sequence[tuple[str, str]] = ()) -> Process:
        """Bring a process to `aim`; how it stands then. Never raises. state `failed`: it must be ended."""
        why = ""
        for _ in range(TRIES):
            try:
                process = Process(aim, (await self._ask("state", pid))["state"])
                await self._go(process, pid, pairs)
                return process
            except Hung as err:
                why = str(err)
                break
            except HelperGone as err:
                why = str(err)  # through no fault of this process: its state is looked at again
        process = Process(aim, "running" if aim == "parked" and not why.startswith(HUNG) else "failed")
        process.error = why
        return process

    async def _go(self, process: Process, pid: int, pairs: Sequence[tuple[str, str]]) -> None:
        while (step := process.step) is not None:
            more: dict[str, Any] = {"timeout_ms": int(1000 * LOCK_WITHIN)} if step == "lock" else {}
            if step == "restore" and pairs:
                more["pairs"] = list(pairs)
            process.answered((await self._ask(step, pid, **more))["error"])

    # -- the helper ---------------------------------------------------------------------------------------------------

    async def _ask(self, do: str, pid: int, **more: Any) -> dict[str, Any]:
        helper = await self._ready()
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        assert helper.stdin is not None
        helper.stdin.write(json.dumps({"id": number, "do": do, "pid": pid, **more}).encode() + b"\n")
        try:
            async with asyncio.timeout(self._step_within):
                answer = await future
        except TimeoutError:
            why = f"{HUNG} {do} it within {self._step_within:.0f} s"
            await self._drop("the helper that asks the driver was started anew")
            raise Hung(why) from None
        finally:
            self._asked.pop(number, None)
        if do == "state" and answer["error"]:
            raise HelperGone(answer["error"])
        return answer

    async def _ready(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._helper is None or self._reader is None or self._reader.done():
                await self._drop("the helper that asks the driver ended")
                await self._start()
            assert self._helper is not None
            return self._helper

    async def _start(self) -> None:
        environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        pipe = asyncio.subprocess.PIPE
        helper = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, env=environ)
        assert helper.stdout is not None
        try:
            async with asyncio.timeout(START_WITHIN):
                first = json.loads(await helper.stdout.readline() or b"{}")
        except (TimeoutError, ValueError):
            first = {}
        if "version" not in first:
            with contextlib.suppress(ProcessLookupError):
                helper.kill()
            await helper.wait()
            raise HelperGone(str(first.get("why") or "the helper that asks the driver did not start"))
        self.version, self._helper = int(first["version"]), helper
        self._reader = asyncio.create_task(self._read(helper.stdout), name="reading the checkpoint helper")

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        while line := await stdout.readline():
            answer = json.loads(line)
            future = self._asked.get(answer["id"])
            if future is not None and not future.done():
                future.set_result(answer)
        self._fail("the helper that asks the driver ended")

    def _fail(self, why: str) -> None:
        for future in self._asked.values():
            if not future.done():
                future.set_exception(HelperGone(why))

    async def _drop(self, why: str) -> None:
        helper, self._helper = self._helper, None
        if self._reader is not None:
            self._reader.cancel()
        if helper is not None:
            with contextlib.suppress(ProcessLookupError):
                helper.kill()
            await helper.wait()
        self._fail(why)
