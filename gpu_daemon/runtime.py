"""How replicas are run: the interface. `process_runtime` runs them as local processes, `docker_runtime` in containers.

A runtime knows nothing of kernels, claims or grants. It starts what it is told to start, finds it again after the
daemon's restart, ends it with everything it started, and says how it ended.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_daemon.lineage import Kin
from nbos_cluster.records import Ports, WarmRecord


def _nobody(text: str) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Launch:
    """One replica to start. folder: its own folder in the run directory (0700), for the runtime's files and its log.

    connection: what its connection file says, but for the address. ip, ports: where routers must reach it.
    command: instead of `python -m nbos_kernel`, () for that. cwd: '' means a folder of the runtime's choice.
    env: the kernel's own additions to the cleaned environment. image: '' means the host's own. memory: bytes that it
    may use, 0 = as much as the host has. again: it ran before in this incarnation, and its router knows its ports.
    tell: what the start waits for, for the user; to be called from the loop.
    """

    kernel: str
    index: int
    incarnation: int
    owner: str
    folder: Path
    connection: Mapping[str, Any]
    ip: str
    ports: Ports
    command: Sequence[str] = ()
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    image: str = ""
    memory: int = 0
    again: bool = False
    tell: Callable[[str], None] = _nobody

    def connection_file(self, ip: str) -> dict[str, Any]:
        """The content of its connection file, for a replica that binds to `ip`."""
        ports = {f"{name}_port": getattr(self.ports, name) for name in Ports.__struct_fields__}
        return {"ip": ip, "transport": "tcp", **ports, **self.connection}

    def argv(self, python: str, socket: str, connection: str) -> tuple[str, ...]:
        """The command line, with the paths as the replica sees them."""
        return (*(self.command or (python, "-m", "nbos_kernel")), "--nbos-socket", socket, "-f", connection)


@dataclass(frozen=True)
class Exit:
    """How a replica ended. code: exit status; signal: number of the signal that ended it; both None: not known.

    detail: what the runtime knows better than these tell.
    """

    code: int | None = None
    signal: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        if self.detail:
            return self.detail
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
    """One running replica. pid: as this host counts. container: its id, '' for a process. ports: those that it has when
    they are not the launch's (it was started ahead)."""

    pid: int
    container: str = ""
    ports: Ports | None = None

    @abstractmethod
    async def wait(self) -> Exit:
        """Return when it is gone. Called once per replica, as soon as it runs; may be cancelled and called again."""

    @abstractmethod
    def kill(self) -> None:
        """End it now, with all that it started. No error when it is gone already. `wait` then returns."""

    @abstractmethod
    def owns(self, pid: int) -> bool:
        """Whether the process `pid` (as this host counts) may use this replica's socket. Asked at `hello`."""

    def holds(self, process: Kin) -> bool:
        """Whether a process of this host is this replica's: itself, or what it started."""
        return self.pid in process.family

    @abstractmethod
    def memory(self) -> int:
        """Bytes of resident memory, 0 when it is gone or something else keeps its limit. Called about twice a second
        for kernels with a limit."""


class ReplicaRuntime(ABC):
    """Starts and finds replicas. Called from the daemon's event loop."""

    socket_mode = 0o600
    """Of a replica's socket: whoever may reach its path may connect."""
    changed: Callable[[], None] = staticmethod(lambda: None)
    """Called when `warm` may answer differently. Set by the daemon."""

    expects = False
    """Whether `expect` makes a difference."""

    def warm(self) -> tuple[WarmRecord, ...]:
        """Replicas that were started ahead and wait, for the host's record."""
        return ()

    def expect(self, wanted: Sequence[tuple[str, str]]) -> None:  # noqa: B027  doing nothing is fine
        """Of exactly these owners, and images ('': the host's own), first kernels may be asked for soon."""

    def imported(self, kernel: str, owner: str, modules: tuple[str, ...]) -> None:  # noqa: B027  doing nothing is fine
        """Cells of the kernel imported these installed modules, as a replica of it says. Called with what is new."""

    async def open(self) -> None:  # noqa: B027  doing nothing is fine
        """Called once, before anything else. Raises RuntimeFailed when no replica can be run here."""

    async def clear(self, kept: Collection[Path]) -> None:  # noqa: B027  doing nothing is fine
        """End what earlier daemons of this host left and nobody found. kept: the folders of those that were found.
        Called once, after the last `find`."""

    async def close(self) -> None:  # noqa: B027  doing nothing is fine
        """Called last. Replicas that still run go on."""

    def socket(self, folder: Path) -> Path:
        """Where the daemon listens for the replica in this folder. Called before it starts or is found; the folder is
        there."""
        return folder / "s"

    @abstractmethod
    async def start(self, launch: Launch) -> Handle:
        """Start it. The daemon calls this only when no replica runs in that folder. Raises RuntimeFailed."""

    @abstractmethod
    async def find(self, folder: Path) -> Handle | None:
        """The replica that an earlier daemon started in this folder, when it still runs. Called at its start."""
