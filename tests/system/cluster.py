"""One `nbos up` on a state directory of its own, for tests: started, looked into, hurt, and ended.

Guarantees: only processes that this `nbos up` started are ever signalled, found below its own process id; `stop`
leaves none of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.system.channels import Channels
from tests.system.hubclient import Hub, Server, eventually
from tests.system.nbosenv import Replica, entered, environment, executor, model, nbos_status, settled
from tests.system.ports import free_port

KERNEL = "nbos-python3"


class Cluster:
    def __init__(self, state_dir: Path, *options: str, module: str = "nbos.cli", hosts: int = 3) -> None:
        self.state_dir, self._module, self._hosts = state_dir, module, hosts
        self.options: Sequence[str] = options
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.state_dir.parent / "up.log"

    def start(self, timeout: float = 90.0) -> None:
        """Until `nbos status` answers, which it does once hub and gateway do."""
        command = [sys.executable, "-m", self._module, "up", "--state-dir", str(self.state_dir)]
        command += ["--port", str(self.port), *self.options]
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environment())
        deadline = time.monotonic() + timeout
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"`nbos up` ended: {self.log.read_text()[-3000:]}")
            with contextlib.suppress(RuntimeError, OSError):
                status = nbos_status(self.state_dir)
                if len(status["hosts"]) == self._hosts:
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"`nbos up` is not there after {timeout} s: {self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def stop(self, how: signal.Signals = signal.SIGINT) -> list[psutil.Process]:
        """End it as a person would; what is still alive 15 s later (nothing, one hopes)."""
        if self.process is None or self.process.poll() is not None:
            return []
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(how)
        self.process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=15)
        return alive

    @property
    def hub(self) -> Hub:
        return entered(self.state_dir)

    def status(self) -> dict[str, Any]:
        return nbos_status(self.state_dir)

    def processes(self, wanted: Callable[[str], bool]) -> list[psutil.Process]:
        """Processes of this cluster whose command line is wanted."""
        if self.process is None:
            raise RuntimeError("the cluster is not started")
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and wanted(" ".join(process.cmdline())):
                    found.append(process)
        return found

    def one(self, *words: str) -> psutil.Process:
        """The one process whose command line holds all words (the eldest, where it has forked)."""
        found = self.processes(lambda line: all(word in line for word in words))
        if not found:
            raise LookupError(f"no process of this cluster with {words}")
        return min(found, key=lambda process: process.create_time())

    def etcd(self) -> psutil.Process:
        return self.one("etcd", "--data-dir")

    def gateway(self) -> psutil.Process:
        return self.one("nbos_spawner.gateway")

    def hub_process(self) -> psutil.Process:
        return self.one("jupyterhub", "-f") if not self.processes(_is_hub) else self.processes(_is_hub)[0]

    def user_server(self, user: str) -> psutil.Process:
        """The process of the user's Jupyter Server."""
        return next(p for p in self.processes(_is_server) if p.environ().get("JUPYTERHUB_USER") == user)

    def daemon_pid(self, host: str) -> int:
        return next(int(h["pid"]) for h in self.status()["hosts"] if h["name"] == host)


def _is_hub(line: str) -> bool:
    return " -m jupyterhub" in line and "singleuser" not in line


class Notebook:
    """A user's kernel with an open websocket."""

    def __init__(self, cluster: Cluster, server: Server, kernel: str, channels: Channels) -> None:
        self.cluster, self.server, self.kernel, self.channels = cluster, server, kernel, channels

    @classmethod
    async def open(cls, cluster: Cluster, user: str, options: dict[str, Any] | None = None) -> Notebook:
        server = await cluster.hub.start_server(user, options)
        kernel = await server.start_kernel(KERNEL)
        return cls(cluster, server, kernel, await server.open(kernel))

    async def run(self, code: str, timeout: float = 40.0, **options: Any) -> str:
        """Run a cell that must succeed; what it printed or its value."""
        result = await self.channels.execute(code, timeout, **options)
        if result.status != "ok":
            raise AssertionError(f"{code!r} gave {result.error}; stderr {result.stderr!r}")
        return result.stdout or result.value

    async def executor(self) -> Replica:
        """The replica that holds the latest state (the gateway may learn of it a moment after the reply)."""

        async def known() -> Replica | None:
            with contextlib.suppress(StopIteration, RuntimeError):
                return await executor(self.cluster.hub, self.kernel)
            return None

        return await eventually(known, f"kernel {self.kernel} has an executor", 10)

    async def settled(self, timeout: float = 40.0) -> list[Replica]:
        return await settled(self.cluster.hub, self.kernel, timeout)

    async def model(self) -> dict[str, Any]:
        return await model(self.cluster.hub, self.kernel)

    async def close(self) -> None:
        await self.channels.close()
        await self.server.delete_kernel(self.kernel)


@contextlib.contextmanager
def paused(*pids: int) -> Iterator[None]:
    """SIGSTOP these processes for as long as the block runs."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def gone(pid: int, timeout: float = 10.0) -> None:
    async def ended() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        return True

    await eventually(ended, f"process {pid} has ended", timeout)


async def after(seconds: float) -> None:
    """Let a fault last: the one thing that only time can do."""
    await asyncio.sleep(seconds)


def _is_server(line: str) -> bool:
    return "singleuser" in line
