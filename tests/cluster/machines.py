"""The compose cluster of `docker/cluster`, for tests: brought up, looked into, hurt and mended.

Guarantees: it has a project, a network, a port and image tags of its own, so that a cluster that somebody uses on this
machine is not touched; `down` leaves nothing but images; a machine that a test hurt is mended at the end of its block.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from nbos_cluster.etcd import TLSFiles
from tests.cluster.history import admin_files
from tests.system.containers.engine import base_image, docker, made_from
from tests.system.hubclient import Hub, eventually
from tests.system.nbosenv import ROOT
from tests.system.ports import free_port

NETWORK = "172.30.78"
HOSTS = ("host-1", "host-2", "host-3")
MEMBERS = ("etcd-1", "etcd-2", "etcd-3")

FILL = """
import errno, itertools, os, sys, time
os.makedirs(sys.argv[1], exist_ok=True)
def until_full(step):
    try:
        while True: step()
    except OSError as err:
        if err.errno != errno.ENOSPC: raise
file = os.open(sys.argv[1] + "/bytes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
until_full(lambda: os.write(file, bytes(1 << 16)))
until_full(lambda: os.write(file, bytes(4096)))
names = itertools.count()
until_full(lambda: os.mknod(f"{sys.argv[1]}/{os.getpid()}-{time.time_ns()}-{next(names)}"))
"""


class Machines:
    """project, port: of a cluster that is up already; else one is made."""

    def __init__(self, project: str = "", port: int = 0, network: str = NETWORK, tag: str = "test") -> None:
        self.project, self.network = project or "nbos-test", network
        self.port = port or free_port()
        own = {"NBOS_PROJECT": self.project, "NBOS_NET": network, "NBOS_PORT": str(self.port), "NBOS_TAG": tag}
        own["NBOS_COMPOSE"] = "tests/cluster/compose.yaml"
        self._tag = tag
        self._admin: Path | None = None
        self._environment = {**os.environ, **own}

    def command(self, *arguments: str, timeout: float = 900.0) -> str:
        """Output of docker/cluster."""
        run = [str(ROOT / "docker" / "cluster"), *arguments]
        done = subprocess.run(run, capture_output=True, text=True, timeout=timeout, check=False, env=self._environment)
        if done.returncode:
            raise RuntimeError(f"docker/cluster {' '.join(arguments)}: {done.stdout[-1500:]}{done.stderr[-3000:]}")
        return done.stdout

    def build(self) -> None:
        base = ["--base", base_image()] if base_image() else []
        self.command("build", *base)
        host = f"nbos/host-machine:{self._tag}"
        install = "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends"
        made_from(host, f"{host}-clock", f"RUN {install} libfaketime >/dev/null && echo +0 >/etc/clock")

    def up(self) -> None:
        self.build()
        self.command("up", "--no-build")

    def down(self) -> None:
        self.command("down", "--volumes", timeout=180)

    def forget(self) -> None:
        """The copy of the administrator's certificate."""
        if self._admin is not None:
            shutil.rmtree(self._admin)

    def container(self, service: str) -> str:
        return f"{self.project}-{service}-1"

    def inside(self, service: str, *command: str, check: bool = True) -> str:
        return docker("exec", self.container(service), *command, check=check)

    def engine(self, service: str, *command: str) -> str:
        """Output of `docker` on that machine's own Engine."""
        return self.inside(service, "docker", *command)

    @cached_property
    def hub(self) -> Hub:
        return Hub(f"http://127.0.0.1:{self.port}", self.inside("hub", "cat", "/etc/nbos-secrets/api-token"))

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.hub.service("GET", "nbos/api/status")
        return found

    def said(self, service: str) -> str:
        """The log of that machine's role."""
        command = ["docker", "logs", self.container(service)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout

    def process(self, service: str, *words: str) -> int:
        """The process id, on that machine, of the eldest process whose command line holds all words."""
        script = (
            "import glob\nfor f in sorted(glob.glob('/proc/[0-9]*/cmdline'), key=lambda f: int(f.split('/')[2])):\n"
            " try: line = open(f).read().replace(chr(0), ' ')\n"
            " except OSError: continue\n"
            f" if all(w in line for w in {words!r}) and 'import glob' not in line and '/machine' not in line:\n"
            "  print(f.split('/')[2]); break"
        )
        found = self.inside(service, "python3", "-c", script)
        if not found:
            raise LookupError(f"no process with {words} on {service}")
        return int(found)

    def kill(self, service: str, *words: str, signal: str = "KILL") -> None:
        """Signal one process of a machine."""
        self.inside(service, "bash", "-c", f"kill -{signal} {self.process(service, *words)}")

    # -- machines hurt, and mended -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def dead(self, service: str) -> AsyncIterator[None]:
        """Without power; started again afterwards."""
        await asyncio.to_thread(docker, "kill", self.container(service))
        try:
            yield
        finally:
            await asyncio.to_thread(docker, "start", self.container(service))

    @asynccontextmanager
    async def cut_off(self, service: str) -> AsyncIterator[None]:
        """Without a network: nothing answers, nobody is told."""
        last = {"hub": 10, "etcd-1": 21, "etcd-2": 22, "etcd-3": 23} | {h: 11 + n for n, h in enumerate(HOSTS)}
        net, container = f"{self.project}_nbos", self.container(service)
        await asyncio.to_thread(docker, "network", "disconnect", net, container)
        try:
            yield
        finally:
            address = f"{self.network}.{last[service]}"
            await asyncio.to_thread(docker, "network", "connect", "--ip", address, net, container)

    @asynccontextmanager
    async def paused(self, service: str) -> AsyncIterator[None]:
        await asyncio.to_thread(docker, "pause", self.container(service))
        try:
            yield
        finally:
            await asyncio.to_thread(docker, "unpause", self.container(service))

    async def fill(self, disk: str) -> None:
        """To the last byte and name; again, what was freed meanwhile."""
        await asyncio.to_thread(self.inside, "disks", "python3", "-c", FILL, f"/disks/{disk}/filler")

    @asynccontextmanager
    async def full(self, disk: str) -> AsyncIterator[None]:
        """Of a host: its run directory; `blobs`: what all share. Neither a byte nor a name more fits there."""
        await self.fill(disk)
        try:
            yield
        finally:
            await asyncio.to_thread(self.inside, "disks", "rm", "-r", f"/disks/{disk}/filler")

    @asynccontextmanager
    async def clock_off(self, service: str, seconds: int) -> AsyncIterator[None]:
        """The daemon's clock is wrong by so many seconds."""
        await asyncio.to_thread(self._set_clock, service, seconds)
        try:
            yield
        finally:
            await asyncio.to_thread(self._set_clock, service, 0)

    def _set_clock(self, service: str, seconds: int) -> None:
        # Renamed: half a number would be another time.
        self.inside(service, "bash", "-c", f"echo {seconds:+d} >/etc/clock.new && mv /etc/clock.new /etc/clock")

    def nbos(self, *arguments: str) -> str:
        """Output of an `nbos` command of the administrator's, with their certificate."""
        volume, net = f"{self.project}_certs:/certs:ro", f"{self.project}_nbos"
        image = f"nbos/hub:{self._environment['NBOS_TAG']}"
        more = ["--dir", "/certs", "--endpoints", ",".join(self.etcd)]
        return docker("run", "--rm", "--user", "0:0", "-v", volume, "--network", net, image, "nbos", *arguments, *more)

    def with_etcd(self, backup: Path, script: str) -> str:
        """Output of a script in etcd's image, with /certs, the disks of its /members, and /backup."""
        volumes = [f"{self.project}_certs:/certs:ro", f"{backup}:/backup"]
        volumes += [f"{self.project}_{member}:/members/{member}" for member in MEMBERS]
        more = [part for volume in volumes for part in ("-v", volume)]
        net = ["--network", f"{self.project}_nbos", "--user", "0:0", "--env", "ETCDCTL_API=3"]
        return docker("run", "--rm", *net, *more, f"nbos/etcd:{self._tag}", "sh", "-c", script)

    async def whole(self, timeout: float = 60.0) -> None:
        """Until hub and gateway answer and all hosts are there."""

        async def there() -> bool:
            try:
                found = await self.status()
            except RuntimeError:
                return False
            return {host["name"] for host in found["hosts"]} == set(HOSTS) and not found["away"]

        await eventually(there, "hub, gateway and all hosts are there", timeout, every=0.3)

    @property
    def etcd(self) -> list[str]:
        return [f"{self.network}.2{n}:2379" for n in (1, 2, 3)]

    def admin(self) -> TLSFiles:
        """The administrator's certificate, from the volume that only the first jobs of the cluster see."""
        if self._admin is None:
            self._admin = Path(tempfile.mkdtemp(prefix="nbos-test-"))
            docker("cp", f"{self.container('certs')}:/certs/admin/.", str(self._admin))
        return admin_files(self._admin)
