"""How replicas are run: the interface. `process_runtime` runs them as local processes; other forms come beside it.

A runtime knows nothing of kernels, claims or grants. It starts what it is told to start, finds it again after the
daemon's restart, ends it with everything it started, and says how it ended.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """One replica to start. folder: its own folder in the run directory (0700), for the runtime's files and its log.

    argv: the command. cwd: '' means the folder. env: the kernel's own additions to the cleaned environment.
    """

    folder: Path
    argv: Sequence[str]
    cwd: str
    env: Mapping[str, str]


@dataclass(frozen=True)
class Exit:
    """How a replica ended. code: exit status; signal: number of the signal that ended it; both None: not known."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return _signal_text(self.signal)
        if self.code is None:
            return "ended (how is not known: it was started before its daemon was restarted)"
        return "ended by itself with exit status 0" if self.code == 0 else f"ended with exit status {self.code}"


def _signal_text(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"killed by signal {number}"
    text = f"killed by signal {number} ({name})"
    if number == signal.SIGKILL:
        return text + "; if you did not do this, the system's out-of-memory killer may have"
    if number == signal.SIGSEGV:
        return text + ": segmentation fault, native code touched memory that is not its own"
    if number == signal.SIGABRT:
        return text + ": native code gave up (abort)"
    if number == signal.SIGBUS:
        return text + ": bus error, a mapped file was cut or shared memory is full"
    return text


class RuntimeFailed(RuntimeError):
    """A replica could not be started: names what failed and the way out."""


class Handle(ABC):
    """One running replica."""

    pid: int

    @abstractmethod
    async def wait(self) -> Exit:
        """Return when it is gone. Called once per replica, as soon as it runs; may be cancelled and called again."""

    @abstractmethod
    def kill(self) -> None:
        """End it now, with all that it started. No error when it is gone already. `wait` then returns."""

    @abstractmethod
    def owns(self, pid: int) -> bool:
        """Whether the process `pid` (as this host counts) may use this replica's socket. Asked at `hello`."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes of resident memory; 0 when it is gone. Called about twice a second for kernels with a limit."""


class ReplicaRuntime(ABC):
    """Starts and finds replicas. Called from the daemon's event loop."""

    @abstractmethod
    async def start(self, launch: Launch) -> Handle:
        """Start it. The daemon calls this only when no replica runs in that folder. Raises RuntimeFailed."""

    @abstractmethod
    async def find(self, folder: Path) -> Handle | None:
        """The replica that an earlier daemon started in this folder, when it still runs. Called at its start."""
