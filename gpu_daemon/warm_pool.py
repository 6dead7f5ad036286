"""The spares of a host whose replicas are processes: made and dropped as `warming` decides, handed out one by one.

Spares are forked from one warm parent; where the imports left something that a fork would break, each is a process
that imported by itself, and the reason is told. A spare is handed out at most once. Without one, and without a parent
to fork one at once, replicas start afresh as they would without this.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_daemon import memory, warming
from gpu_daemon.site import log
from gpu_daemon.warm_process import NotWarm, Ready, Spare, WarmParent, environment_reads, start_alone
from gpu_daemon.warming import Warming
from nbos_cluster.records import WarmRecord

IMAGE = ""
"""Processes all have the environment of their daemon."""
LOOK_EVERY = 5.0
"""Seconds between two looks at the host's memory and the demand."""


@dataclass(frozen=True)
class WarmOptions:
    """images: of containers, always kept where these do not depend on their owner; () for the site's own."""

    policy: warming.Policy
    modules: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


class WarmPool:
    """env: of every spare. folder: for its log and the warm parent's. changed: called when `record` may differ."""

    def __init__(self, options: WarmOptions, env: Mapping[str, str], folder: Path) -> None:
        self._options, self._env, self._folder = options, dict(env), folder
        self._warming = Warming(options.policy)
        self._spares: list[Spare] = []
        self._parent: WarmParent | None = None
        self._starting = asyncio.Lock()
        self._ready = Ready()
        self._note = ""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refused: set[tuple[str, ...]] = set()
        self._closing = False
        self.changed: Callable[[], None] = lambda: None

    async def open(self) -> None:
        self._spawn(self._look())

    async def close(self) -> None:
        """Parent and spares end; replicas go on."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        spares, self._spares = self._spares, []
        for spare in spares:
            self._unwatch(spare)
            await spare.discard()
        if self._parent is not None:
            await self._parent.close()

    def record(self) -> WarmRecord:
        ready = self._warming.ready(IMAGE)
        return WarmRecord(image=IMAGE, ready=ready, wanted=self._warming.wanted(IMAGE, _now()), note=self._said())

    async def take(self, env: Mapping[str, str]) -> Spare | None:
        """A spare for a replica with this environment; it is the caller's. None: start the replica afresh."""
        self._handle(warming.Arrived(IMAGE, _now()))
        if reads := environment_reads(self._ready, self._env, env):
            self._refuse(tuple(reads))
            return None
        while self._spares:
            spare = self._spares.pop(0)
            self._unwatch(spare)
            self._handle(warming.Gone(IMAGE, _now()))
            if spare.alive():
                return spare
            self._spawn(spare.discard())
        # A fork takes a few milliseconds: far less than to start afresh.
        if self._parent is not None and self._parent.alive:
            with contextlib.suppress(NotWarm):
                return await self._parent.fork()
        return None

    def _refuse(self, reads: tuple[str, ...]) -> None:
        if reads not in self._refused:
            self._refused.add(reads)
            log.info("replicas with their own %s start afresh: warm ones have read that already", ", ".join(reads))

    def _said(self) -> str:
        return "memory is short" if self._warming.short else self._note

    # -- making and dropping ------------------------------------------------------------------------------------------

    def _handle(self, event: warming.Event) -> None:
        if self._closing:
            return
        for step in self._warming.handle(event):
            match step:
                case warming.Make():
                    self._spawn(self._make())
                case warming.Drop():
                    spare = self._spares.pop()
                    self._unwatch(spare)
                    self._spawn(spare.discard())
        self.changed()

    async def _make(self) -> None:
        try:
            if not self._ready.unsafe:
                await self._have_parent()
            began = time.monotonic()
            spare = await self._new()
        except NotWarm as err:
            if self._note != str(err):
                log.warning("no replica is kept warm: %s", err)
            self._note = str(err)
            self._handle(warming.Failed(IMAGE, _now()))
            return
        self._note = self._ready.unsafe and f"not forked: {self._ready.unsafe}"
        took = time.monotonic() - began
        size = await asyncio.to_thread(memory.private, spare.pid)
        self._spares.append(spare)
        asyncio.get_running_loop().add_reader(spare.socket, self._ended, spare)
        self._handle(warming.Made(IMAGE, took, size, _now()))

    async def _have_parent(self) -> None:
        async with self._starting:
            if self._parent is not None and self._parent.alive:
                return
            parent = WarmParent(self._options.modules, self._env, self._folder)
            await parent.start()
            self._ready = parent.ready
            if self._ready.unsafe:
                log.warning("replicas are not forked from a warm parent: %s; each is warmed alone", self._ready.unsafe)
            else:
                self._parent = parent
                log.info("warm parent of replicas started as process %d", parent.pid)

    async def _new(self) -> Spare:
        if self._ready.unsafe:
            spare, self._ready = await self._alone()
            return spare
        assert self._parent is not None
        return await self._parent.fork()

    async def _alone(self) -> tuple[Spare, Ready]:
        spare, ready = await start_alone(self._options.modules, self._env, self._folder / "alone")
        # It need not be found unsafe again (a module that starts its threads now and then): once is enough.
        return spare, Ready(self._ready.reads | ready.reads, ready.failed, self._ready.unsafe, ready.resident)

    def _ended(self, spare: Spare) -> None:
        """A waiting spare says nothing: its socket can be read when it is gone."""
        if spare in self._spares:
            self._unwatch(spare)
            self._spares.remove(spare)
            log.warning("spare %d ended before it was needed", spare.pid)
            self._spawn(spare.discard())
            self._handle(warming.Gone(IMAGE, _now()))

    def _unwatch(self, spare: Spare) -> None:
        asyncio.get_running_loop().remove_reader(spare.socket)

    async def _look(self) -> None:
        while True:
            self._handle(warming.Memory(memory.host.available(), _now()))
            await asyncio.sleep(LOOK_EVERY)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("keeping replicas warm failed", exc_info=error)


def _now() -> float:
    return time.monotonic()
