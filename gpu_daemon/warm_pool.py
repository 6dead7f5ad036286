"""The spares of a host whose replicas are processes: made and dropped as `warming` decides, handed out one by one.

Spares are forked from one warm parent; where the imports left something that a fork would break, each is a process
that imported by itself, and the reason is told. A spare is handed out at most once. Without one, and without a parent
to fork one at once, replicas start afresh as they would without this.

What is imported ahead is learnt from what kernels import (`warm_learning`): a second parent is made with it, in the
background, and takes the place of the first when it is ready. A parent that nobody is forked from any more stays until
the replicas that it forked have ended, since it tells how they did.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_daemon import memory, preloading, warming
from gpu_daemon.preloading import Preloading
from gpu_daemon.site import log
from gpu_daemon.warm_fit import why_afresh
from gpu_daemon.warm_learning import Learning, environment
from gpu_daemon.warm_process import NotWarm, Ready, Spare, WarmParent, start_alone
from gpu_daemon.warming import Warming
from nbos_cluster.records import WarmRecord

IMAGE = ""
"""Processes all have the environment of their daemon."""
LOOK_EVERY = 5.0
"""Seconds between two looks at the host's memory and the demand."""
MOST_RETIRED = 4
"""Parents that are kept only to tell how their replicas end."""


@dataclass(frozen=True)
class WarmOptions:
    """images: of containers, always kept where these do not depend on their owner; () for the site's own."""

    policy: warming.Policy
    modules: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    preload: preloading.Policy = field(default_factory=preloading.Policy)


class WarmPool:
    """env: of every spare. folder: for its log and the warm parent's, and what was learnt. changed: called when
    `record` may differ."""

    def __init__(self, options: WarmOptions, env: Mapping[str, str], folder: Path) -> None:
        self._options, self._env, self._folder = options, dict(env), folder
        self._warming = Warming(options.policy)
        self._spares: list[Spare] = []
        self._parent: WarmParent | None = None
        self._retired: list[WarmParent] = []
        self._builds = 0
        self._environment = environment()
        """As it was when the parent's imports began."""
        machine = Preloading(options.preload, frozenset(options.modules))
        kept = folder / "imported.json"
        self._learning = Learning(machine, self._env, folder, kept, self._with, self._spawn, _now)
        self._starting = asyncio.Lock()
        self._ready = Ready()
        self._note = ""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refused: set[str] = set()
        self._closing = False
        self.changed: Callable[[], None] = lambda: None

    async def open(self) -> None:
        await asyncio.to_thread(self._learning.load)
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
        for parent in (self._parent, *self._retired):
            if parent is not None:
                await parent.close()

    def imported(self, kernel: str, owner: str, modules: tuple[str, ...]) -> None:
        """Cells of this kernel imported these, as a replica of it says."""
        if not self._closing:
            self._learning.imported(kernel, owner, modules)

    def record(self) -> WarmRecord:
        ready = self._warming.ready(IMAGE)
        learning = self._learning
        return WarmRecord(
            image=IMAGE,
            ready=ready,
            wanted=self._warming.wanted(IMAGE, _now()),
            note=self._said(),
            modules=(*self._options.modules, *learning.modules()),
            refused=learning.refused(),
        )

    async def take(self, env: Mapping[str, str], cwd: str) -> Spare | None:
        """A spare for a replica with this environment and folder; it is the caller's. None: start it afresh."""
        self._handle(warming.Arrived(IMAGE, _now()))
        if reason := await why_afresh(self._ready, self._env, env, cwd, self._environment):
            self._refuse(reason)
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

    def _refuse(self, reason: str) -> None:
        if reason not in self._refused and len(self._refused) < 1000:
            self._refused.add(reason)
            log.info("%s", reason)

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
        self._wait_for(spare)
        self._handle(warming.Made(IMAGE, took, size, _now()))

    async def _have_parent(self) -> None:
        """At first, and when one has died, without what was learnt: that is there sooner."""
        async with self._starting:
            if self._parent is not None and self._parent.alive:
                return
            if self._parent is not None:
                self._learning.parent_gone()
            before, parent = environment(), WarmParent(self._options.modules, self._env, self._folder)
            await parent.start()
            self._ready = parent.ready
            if self._ready.unsafe:
                log.warning("replicas are not forked from a warm parent: %s; each is warmed alone", self._ready.unsafe)
            else:
                self._parent, self._environment = parent, before
                log.info("warm parent of replicas started as process %d", parent.pid)

    async def _with(self, modules: tuple[str, ...]) -> Ready:
        """Let replicas be forked from a parent that has imported these as well. Raises NotWarm."""
        self._builds += 1
        everything, folder = (*self._options.modules, *modules), self._folder / f"parent-{self._builds % 2}"
        before, parent = environment(), WarmParent(everything, self._env, folder, gently=True)
        await parent.start()
        if parent.ready.unsafe:
            return parent.ready
        async with self._starting:
            old, self._parent, self._ready = self._parent, parent, parent.ready
            self._environment = before
            if old is not None:
                self._retired.append(old)
        log.info("warm parent of replicas started as process %d, with %s", parent.pid, ", ".join(modules) or "no more")
        with contextlib.suppress(NotWarm):  # it died just now, which the next that is made finds out
            await self._renew_spares(parent)
        await self._end_retired()
        return parent.ready

    async def _renew_spares(self, parent: WarmParent) -> None:
        """Those that wait are the old parent's: for each one of the new, so that never fewer wait."""
        for spare in list(self._spares):
            new = await parent.fork()
            if spare not in self._spares:
                await new.discard()
                continue
            self._unwatch(spare)
            self._spares[self._spares.index(spare)] = new
            self._wait_for(new)
            await spare.discard()
        self.changed()

    async def _end_retired(self) -> None:
        for parent in list(self._retired):
            if parent.idle or not parent.alive or len(self._retired) > MOST_RETIRED:
                self._retired.remove(parent)
                await parent.close()

    async def _new(self) -> Spare:
        if self._ready.unsafe:
            spare, self._ready = await self._alone()
            return spare
        assert self._parent is not None
        return await self._parent.fork()

    async def _alone(self) -> tuple[Spare, Ready]:
        spare, ready = await start_alone(self._options.modules, self._env, self._folder / "alone")
        # It need not be found unsafe again (a module that starts its threads now and then): once is enough.
        return spare, replace(ready, reads=self._ready.reads | ready.reads, unsafe=self._ready.unsafe)

    def _wait_for(self, spare: Spare) -> None:
        asyncio.get_running_loop().add_reader(spare.socket, self._ended, spare)

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
            available = memory.host.available()
            self._handle(warming.Memory(available, _now()))
            if self._parent is not None and not self._ready.unsafe:
                self._learning.look(available)
                await self._end_retired()
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
