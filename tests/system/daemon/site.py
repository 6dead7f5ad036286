"""Daemons of a test as real processes, their replicas' doubles, and what etcd holds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_daemon.fleet import ReplicaId
from gpu_daemon.rundir import RunDir
from nbos_cluster import keys, membership, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import Snapshot
from nbos_cluster.records import GrantRecord, KernelSpec, Resources

ROOT = Path(__file__).parents[3]
DOUBLE = Path(__file__).with_name("replica_double.py")


class Replica:
    """The test's line to one double."""

    def __init__(self, folder: Path) -> None:
        self.control = folder / "c"

    async def order(self, seconds: float = 20.0, **order: Any) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self.control), limit=1 << 26)
                break
            except OSError:
                assert time.monotonic() < deadline, f"no double at {self.control}"
                await asyncio.sleep(0.02)
        try:
            writer.write(json.dumps(order).encode() + b"\n")
            line = await asyncio.wait_for(reader.readline(), max(0.1, deadline - time.monotonic()))
            return json.loads(line) if line else None
        except ConnectionError:
            # It was killed meanwhile.
            return None
        finally:
            writer.close()

    async def ready(self, applied: int = 0) -> dict[str, Any]:
        """Connected, and it has applied the log up to `applied`."""
        deadline = time.monotonic() + 20
        while True:
            state = await self.order()
            if state and state["connected"] and state["applied"] >= applied:
                return dict(state)
            assert time.monotonic() < deadline, f"not ready: {state}"
            await asyncio.sleep(0.02)

    async def send(self, type: str, payload: bytes = b"", seconds: float = 20.0, **fields: Any) -> Any:
        return await self.order(seconds, send={"type": type, **fields}, payload=payload.hex())

    async def bid(self, n: int, seconds: float = 20.0, wait: bool = False, **resources: Any) -> Any:
        return await self.send(
            "bid", seconds=seconds, n=n, attempt=1, kind="cell", resources=resources, wait=wait, applied=n - 1
        )

    async def append(self, n: int, token: int, seconds: float = 20.0, **entry: Any) -> Any:
        entry = {"n": n, "kind": "cell", "execution_count": n, **entry}
        return await self.send("append", seconds=seconds, entry=entry, token=token)

    async def pushed(self, type: str) -> list[dict[str, Any]]:
        return list(await self.order(pushed=type))


class Host:
    """One daemon process."""

    def __init__(self, directory: Path, name: str, endpoint: str, **config: Any) -> None:
        self.name = name
        self.run_dir = directory / name
        self.config = directory / f"{name}.json"
        self.log = directory / f"{name}.log"
        sections = {name: config.pop(name) for name in list(config) if name[0].isupper()}  # Metrics={…}
        command = config.pop("replica_command", [sys.executable, str(DOUBLE)])
        self.environment: dict[str, str] = config.pop("environment", {})
        health = config.pop("health", {})
        warm = config.pop("warm", {})
        options = {
            "host": name,
            "run_dir": str(self.run_dir),
            "etcd_endpoints": [endpoint],
            "blob_store": f"file://{directory}/blobs",
            "devices": "simulated",
            "simulated_devices": 2,
            "simulated_tpcs": 8,
            "simulated_memory": "8G",
            "lease_ttl": 2,
            "replica_command": command,
            **config,
        }
        sections = {**sections, "Health": health, "Warm": warm}
        self.config.write_text(json.dumps({"GPUDaemon": options, **sections}))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Host:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        secret = {"DAEMON_SECRET": "do not pass on"}
        environment = {**os.environ, **self.environment, "PYTHONPATH": path, **secret}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu_daemon", "--config", str(self.config), "--log-level=INFO"],
                env=environment,
                stdout=log,
                stderr=log,
            )
        return self

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(10)

    def end(self) -> None:
        """For fixtures: the daemon and every replica it started are gone."""
        if self.process is not None and self.process.poll() is None:
            self.kill(signal.SIGTERM)
        for saved in self.run_dir.glob("r/*/process.json"):
            try:
                os.killpg(json.loads(saved.read_text())["pid"], signal.SIGKILL)
            except ProcessLookupError:
                continue

    def folder(self, kernel: str, index: int) -> Path:
        return RunDir(self.run_dir).folder(ReplicaId(kernel, index))

    def replica(self, kernel: str, index: int) -> Replica:
        return Replica(self.folder(kernel, index))


def kernel_spec(kernel: str, *hosts: str, owner: str = "ann", **fields: Any) -> KernelSpec:
    return KernelSpec(
        kernel=kernel,
        owner=owner,
        replicas=len(hosts),
        placement={str(i): host for i, host in enumerate(hosts)},
        key="key",
        curve_publickey="p" * 40,
        curve_secretkey="s" * 40,
        max_resources=Resources(gpus=8, tpcs=64),
        **fields,
    )


async def create(etcd: Etcd, spec: KernelSpec) -> None:
    assert (await etcd.commit(membership.create(spec))).succeeded


async def view_of(etcd: Etcd, kernel: str) -> KernelView:
    view = KernelView(kernel)
    kvs, revision = await etcd.range(keys.kernel(kernel))
    view.apply(Snapshot(kvs, revision))
    return view


async def grants_of(etcd: Etcd, host: str) -> list[GrantRecord]:
    found, _ = await etcd.range(keys.grants(host))
    return [records.decode(kv.value, GrantRecord) for kv in found]
