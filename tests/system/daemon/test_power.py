"""Clocks that a daemon has locked are reset however it ends: by itself, by the process beside it, or the next one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import HostRecord
from tests.fakes import build
from tests.fakes.nvml import PlayedNVML, gpu
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Host, Replica, create, kernel_spec
from tests.system.etcdserver import eventually

UUID = "6d2a3c1e-0102-0304-0506-0708090a0b0c"
POWER = {"enabled": True, "down_after": 1.0, "up_after": 0.5, "every": 0.1}


class Machine:
    """A played H200 with some clocks, and what was done to them."""

    def __init__(self, folder: Path, *lines: str) -> None:
        self.driver = PlayedNVML(folder, gpu(0, uuid=f"GPU-{UUID}", clocks="210,990,1500,1905,1980"), *lines)
        build(self.driver.library, "cuda.c", "libcuda.so.1")
        self.file = folder / "clocks"
        self.environment = {
            **self.driver.environment,
            "FAKE_CUDA_UUID": UUID,
            "NBOS_FAKE_NVML_CLOCKS": str(self.file),
        }

    def done(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def locked(client: Etcd, host: MakeHost, machine: Machine, **power: Any) -> tuple[Host, Replica]:
    """A daemon that has locked its device, on which a cell runs of which nothing is known: 4 % below the highest."""
    a = host("a", devices="nvml", environment=machine.environment, Power={**POWER, **power})
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    assert (await replica.bid(1, tpcs=8))["answer"] == "lead"

    async def seen() -> bool:
        return machine.done() == ["0 locked 210-1905"]

    await eventually(seen, "the clocks are locked, with the idle ones left free", 10)
    return a, replica


def note(host: Host) -> list[str]:
    path = host.run_dir / "clocks.json"
    return list(json.loads(path.read_text())["locked"]) if path.exists() else []


def restorer(host: Host) -> psutil.Process | None:
    assert host.process is not None
    found = [p for p in psutil.Process(host.process.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
    return next((p for p in found if "gpu_daemon.power.restorer" in " ".join(p.cmdline())), None)


async def reset(machine: Machine, host: Host) -> None:
    async def seen() -> bool:
        return machine.done()[-1:] == ["0 reset"] and note(host) == []

    await eventually(seen, "the clocks are reset, and the note is gone", 10)


async def test_a_daemon_that_ends_resets_them_and_tells_them_while_it_lives(
    client: Etcd, host: MakeHost, machine: Machine
) -> None:
    a, _ = await locked(client, host, machine)
    assert note(a) == [f"GPU-{UUID}"]

    async def told() -> bool:
        found = await client.get(keys.host("a"))
        clocks = records.decode(found.value, HostRecord).clocks if found is not None else {}
        return dict(clocks) == {f"GPU-{UUID}": (1905, 1980)}

    await eventually(told, "the host's record says so", 5)
    beside = restorer(a)
    assert beside is not None
    a.kill(signal.SIGTERM)
    assert machine.done() == ["0 locked 210-1905", "0 reset"]
    assert note(a) == []

    async def gone() -> bool:
        return not beside.is_running() or beside.status() == psutil.STATUS_ZOMBIE

    await eventually(gone, "the process beside it ends", 5)
    assert machine.done().count("0 reset") == 1


async def test_a_daemon_that_is_killed_leaves_it_to_the_process_beside_it(
    client: Etcd, host: MakeHost, machine: Machine
) -> None:
    a, _ = await locked(client, host, machine)
    beside = restorer(a)
    assert beside is not None
    beside.send_signal(signal.SIGTERM)  # as a service's stop sends to all of its processes
    a.kill()
    await reset(machine, a)


async def test_a_process_beside_it_that_is_killed_is_replaced(client: Etcd, host: MakeHost, machine: Machine) -> None:
    a, _ = await locked(client, host, machine)
    first = restorer(a)
    assert first is not None
    first.kill()

    async def another() -> bool:
        now = restorer(a)
        return now is not None and now.pid != first.pid

    await eventually(another, "there is another one", 5)
    a.kill()
    await reset(machine, a)


async def test_when_both_are_killed_the_next_daemon_resets_them(client: Etcd, host: MakeHost, machine: Machine) -> None:
    a, _ = await locked(client, host, machine, every=5.0)
    beside = restorer(a)
    assert beside is not None
    assert a.process is not None
    os.kill(a.process.pid, signal.SIGSTOP)
    beside.kill()
    a.kill()
    await asyncio.sleep(0.5)  # what must not happen has time to
    assert machine.done() == ["0 locked 210-1905"]
    assert note(a) == [f"GPU-{UUID}"]
    config = json.loads(a.config.read_text())
    a.config.write_text(json.dumps({**config, "Power": {"enabled": False}}))
    a.start()
    await reset(machine, a)


async def test_without_permission_they_are_left_alone_and_cells_run(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, "fault nvmlDeviceSetGpuLockedClocks 0 4")
    a = host("a", devices="nvml", environment=machine.environment, Power=POWER)
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    assert (await replica.bid(1, tpcs=8))["answer"] == "lead"

    async def said() -> bool:
        return "the daemon has to run as root for that" in a.log.read_text()

    await eventually(said, "the log says why", 10)
    await reset(machine, a)
    assert (await replica.send("release", n=1))["ok"]
    assert a.log.read_text().count("clocks are left alone from now on") == 1


async def test_clocks_of_simulated_devices_are_felt_by_the_cells_they_are_granted_to(
    client: Etcd, host: MakeHost
) -> None:
    a = host("a", Power=POWER, simulated_devices=1)
    for kernel in ("k", "other"):
        await create(client, kernel_spec(kernel, "a"))
    first, second = a.replica("k", 0), a.replica("other", 0)
    await first.ready()
    await second.ready()
    await first.bid(1, tpcs=2)

    async def told() -> bool:
        found = await client.get(keys.host("a"))
        return found is not None and bool(records.decode(found.value, HostRecord).clocks)

    await eventually(told, "the device's clock is lower", 10)
    lead = await second.bid(1, tpcs=2)
    assert 0.95 < lead["grant"]["shares"][0]["clock"] < 1
