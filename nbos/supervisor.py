"""Child processes of `nbos up`: started, watched, started again when they die, and ended, with all they left
behind.

It must guarantee: nothing that was started, or that a child of it started, outlives `stop`; a child that dies
is started again after a growing pause, with a line that says so; children end when this process is killed.
Children get a session of their own, so that Ctrl-C in the terminal reaches only us and the order of ending is
ours.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from nbos_spawner.processes import adopt_orphans, die_with_parent

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
STEADY = 20.0
"""Seconds a process must have lived for its death not to count as one of a row."""

LOG_LIMIT = 20 << 20
"""Bytes of a log file after which the next start begins a new one."""


@dataclass
class Backoff:
    """The pause before a process is started again. No clock: `lived` is how long it was up, in seconds."""

    pause: float = FIRST_PAUSE

    def died(self, lived: float) -> float:
        if lived >= STEADY:
            self.pause = FIRST_PAUSE
        pause, self.pause = self.pause, min(LONGEST_PAUSE, self.pause * 2)
        return pause


@dataclass
class Child:
    """One process to keep running. `label` is how people call it."""

    name: str
    label: str
    command: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    log: Path
    pid: int = 0
    started: float = 0.0
    ended: int | None = None
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def alive(self) -> bool:
        return self.pid > 0 and self.ended is None

    def last_words(self, lines: int = 8) -> str:
        """The end of its log, for a message."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


class Supervisor:
    """Owns all children. `say` prints a line for the person at the terminal."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.children: dict[str, Child] = {}
        self.stopping = False
        self._changed = asyncio.Event()
        self._restarts: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Called once, in the loop's thread, before the first start."""
        adopt_orphans()
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    def start(self, child: Child) -> None:
        self.children[child.name] = child
        child.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if child.log.exists() and child.log.stat().st_size > LOG_LIMIT:
            child.log.replace(child.log.with_suffix(".old.log"))
        parent = os.getpid()
        with open(os.open(child.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as log:
            process = subprocess.Popen(
                list(child.command),
                env=dict(child.env),
                cwd=child.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )
        process.returncode = 0  # we reap it ourselves, together with orphans; Popen must not wait for it
        child.pid, child.started, child.ended = process.pid, time.monotonic(), None

    def _reap(self) -> None:
        """SIGCHLD: collect every ended child, and orphans that became ours."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            for child in self.children.values():
                if child.pid == pid:
                    child.ended = os.waitstatus_to_exitcode(status)
                    self._died(child)
        self._changed.set()

    def _died(self, child: Child) -> None:
        if self.stopping:
            return
        pause = child.backoff.died(time.monotonic() - child.started)
        self.say(f"{child.label} ended ({describe(child.ended)}); starting it again in {pause:.1f} s")
        task = asyncio.ensure_future(self._start_again(child, pause))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _start_again(self, child: Child, pause: float) -> None:
        await asyncio.sleep(pause)
        if not self.stopping:
            self.start(child)
            self.say(f"{child.label} runs again (process {child.pid}; log: {child.log})")

    async def end(self, names: Sequence[str], seconds: float) -> None:
        """SIGTERM to these children; wait until they are gone, or `seconds` are over."""
        self.stopping = True
        for name in names:
            child = self.children.get(name)
            if child is not None and child.alive:
                _send(child.pid, signal.SIGTERM)
        await self._until(lambda: not any(c.alive for n, c in self.children.items() if n in names), seconds)

    async def end_others(self, keep: Sequence[str], seconds: float) -> None:
        """SIGTERM to every descendant but the children named in `keep`; wait for them, then SIGKILL."""
        kept = {child.pid for name, child in self.children.items() if name in keep and child.alive}
        for process in self._others(kept):
            _send(process.pid, signal.SIGTERM)
        if not await self._until(lambda: not self._others(kept), seconds):
            for process in self._others(kept):
                _send(process.pid, signal.SIGKILL)
            await self._until(lambda: not self._others(kept), 3.0)

    def _others(self, kept: set[int]) -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if p.pid not in kept and _lives(p)]

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._changed.clear()
            try:
                # Grandchildren end without a signal to us, so look again from time to time.
                await asyncio.wait_for(self._changed.wait(), min(left, 0.1))
            except TimeoutError:
                continue
        return True


def describe(ended: int | None) -> str:
    """An exit status in words."""
    if ended is None:
        return "still running"
    if ended < 0:
        try:
            return f"killed by {signal.Signals(-ended).name}"
        except ValueError:
            return f"killed by signal {-ended}"
    return f"exit code {ended}"


def end_descendants(seconds: float) -> None:
    """Kill whatever this process still has below it; the last step of the outermost process."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = [p for p in psutil.Process().children(recursive=True) if _lives(p)]
        if not left:
            return
        for process in left:
            _send(process.pid, signal.SIGKILL)
        psutil.wait_procs(left, timeout=0.5)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
