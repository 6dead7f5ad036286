"""What a host's kernels import, kept over restarts, and what follows from it carried out: trials of modules, and warm
parents with those that passed. The decisions are `preloading`'s."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil

from gpu_daemon import preloading
from gpu_daemon.preloading import Preloading
from gpu_daemon.rundir import read_json, write_json
from gpu_daemon.site import log
from gpu_daemon.warm_process import NotWarm, Ready
from gpu_daemon.warm_trial import tried

FORMAT = 1


class Parents(Protocol):
    """Who makes warm parents, and lets spares be forked from the newest."""

    def __call__(self, modules: tuple[str, ...]) -> Awaitable[Ready]:
        """Spares are forked from a parent with these from now on. Raises NotWarm; the one before then stays."""


class Learning:
    """env: of trials. folder: for their logs. file: where it is kept what was learnt. spawn: runs work in the
    background."""

    def __init__(
        self,
        machine: Preloading,
        env: Mapping[str, str],
        folder: Path,
        file: Path,
        build: Parents,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        now: Callable[[], float],
    ) -> None:
        self._machine, self._env, self._folder, self._file = machine, env, folder, file
        self._build_parent, self._spawn, self._now = build, spawn, now

    def load(self) -> None:
        """Take up what was kept; something else than that is said and left."""
        saved = read_json(self._file)
        if saved is None or not self._machine.policy.learn:
            return
        try:
            if saved["format"] == FORMAT:
                self._machine.load(saved["kernels"])
        except (KeyError, TypeError, AttributeError) as err:
            log.warning("%s is damaged (%s); what kernels import is learnt anew", self._file, err)

    def save(self) -> None:
        if self._machine.dirty:
            write_json(self._file, {"format": FORMAT, "kernels": self._machine.dump()})

    def modules(self) -> tuple[str, ...]:
        return self._machine.built

    def refused(self) -> dict[str, str]:
        return self._machine.refused()

    def imported(self, kernel: str, owner: str, modules: tuple[str, ...]) -> None:
        self._handle(preloading.Imported(kernel, owner, modules, self._now()))
        self.save()

    def look(self, available: int) -> None:
        # Since it was asked for last.
        idle = (1.0 - psutil.cpu_percent() / 100.0) * (os.cpu_count() or 1)
        self._handle(preloading.Look(available, environment(), self._now(), idle))

    def parent_gone(self) -> None:
        if self._machine.built:
            self._handle(preloading.Gone(self._now()))

    def _handle(self, event: preloading.Event) -> None:
        for step in self._machine.handle(event):
            match step:
                case preloading.Try(modules):
                    self._spawn(self._try(modules))
                case preloading.Build(modules):
                    self._spawn(self._build(modules))

    async def _try(self, modules: tuple[str, ...]) -> None:
        trouble = ""
        try:
            async for verdict in tried(modules, self._env, self._folder / "trial"):
                if verdict.reason:
                    log.info("module %s is not imported ahead: %s", verdict.module, verdict.reason)
                self._handle(
                    preloading.Judged(verdict.module, verdict.reason, verdict.seconds, verdict.size, self._now())
                )
        except NotWarm as err:
            trouble = str(err)
            log.warning("modules cannot be tried out: %s", err)
        self._handle(preloading.TrialOver(self._now(), trouble))

    async def _build(self, modules: tuple[str, ...]) -> None:
        try:
            ready = await self._build_parent(modules)
        except NotWarm as err:
            log.warning("no warm parent with %s: %s", ", ".join(modules) or "nothing learnt", err)
            self._handle(preloading.NotBuilt(str(err), "", self._now()))
            return
        if ready.unsafe:
            culprit = ready.culprit if ready.culprit in modules else ""
            self._handle(preloading.NotBuilt(ready.unsafe, culprit, self._now()))
            return
        log.info("imported ahead for replicas: %s", ", ".join(modules) or "nothing that was learnt")
        failed = {name: reason for name, reason in ready.failed.items() if name in modules}
        self._handle(preloading.Built(modules, failed, self._now()))


def environment() -> str:
    """Another text when a package was installed, removed or replaced: the folders of packages have changed then."""
    paths = {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    marks = [sys.executable]
    for path in sorted(paths):
        try:
            marks.append(f"{path} {os.stat(path).st_mtime_ns}")
        except OSError:
            marks.append(f"{path} is not there")
    return "; ".join(marks)
