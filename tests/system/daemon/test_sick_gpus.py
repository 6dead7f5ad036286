"""A real daemon above a played driver: devices fall ill and get well, and those who ask for them are told.

The devices are MIG instances, whose SMs NVML tells itself: no CUDA driver is needed to count them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbos.hostchange import DrainFailed, close_gpus
from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import Device, HostRecord
from tests.fakes.nvml import PlayedNVML, gpu, mig
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Host, Replica, create, kernel_spec
from tests.system.hubclient import eventually

LOST = 15
QUICK = {"every": 0.1, "stuck": 0.5}


@pytest.fixture
def driver(tmp_path: Path) -> PlayedNVML:
    """Two GPUs, the first of them cut into two instances, the second with one."""
    return PlayedNVML(tmp_path, *machine())


def machine(**first: Any) -> list[str]:
    return [gpu(0, mig=1, **first), mig(0), mig(1), gpu(1, mig=1), mig(2, name="NVIDIA_H200_MIG_3g.71gb", sms=60)]


async def record(client: Etcd) -> HostRecord:
    found = await client.get(keys.host("a"))
    assert found is not None
    return records.decode(found.value, HostRecord)


async def device(client: Etcd, uuid: str, wanted: Callable[[Device], bool]) -> Device:
    """The device's record, once it is as wanted."""

    async def there() -> Device | None:
        found = await client.get(keys.host("a"))
        devices = records.decode(found.value, HostRecord).devices if found is not None else ()
        return next((d for d in devices if d.uuid == uuid and wanted(d)), None)

    return await eventually(there, f"{uuid} is as it should be", 10)


def ill(one: Device) -> bool:
    return not one.healthy


def well(one: Device) -> bool:
    return one.healthy


async def kernel(client: Etcd, host: Host, name: str) -> Replica:
    await create(client, kernel_spec(name, "a"))
    replica = host.replica(name, 0)
    await replica.ready()
    return replica


def above(host: MakeHost, driver: PlayedNVML) -> Host:
    return host("a", devices="nvml", environment=driver.environment, health=QUICK)


async def test_how_devices_are_is_published_with_whose_processes_run_on_them(
    client: Etcd, host: MakeHost, driver: PlayedNVML
) -> None:
    a = above(host, driver)
    replica = await kernel(client, a, "k")
    pid = (await replica.order())["pid"]
    lines = machine(temperature=66)
    lines[1] = mig(0, used=5 << 30, procs=f"{pid}:{1 << 30},1:7")
    driver.play(*lines)

    async def read() -> HostRecord | None:
        found = await record(client)
        return found if found.readings and found.readings[0].temperature == 66 else None

    found = await eventually(read, "the readings are published", 10)
    assert found.driver == "580.65.06"
    assert [(d.model, d.tpcs, d.capability) for d in found.devices][2] == ("NVIDIA H200 MIG 3g.71gb", 30, "9.0")
    reading = found.readings[0]
    assert (reading.uuid, reading.memory, reading.power_limit) == ("MIG-0", 5 << 30, 700)
    mine, stranger = reading.processes
    assert (mine.kernel, mine.replica, mine.owner, mine.memory) == ("k", 0, "ann", 1 << 30)
    assert (stranger.pid, stranger.kernel) == (1, "")


async def test_an_xid_takes_a_gpu_out_of_use_until_an_admin_says_so_also_over_a_restart(
    client: Etcd, host: MakeHost, driver: PlayedNVML
) -> None:
    a = above(host, driver)
    replica = await kernel(client, a, "k")
    lead = await replica.bid(1, gpus=1, model="3g.71gb")
    assert lead["grant"]["shares"][0]["uuid"] == "MIG-2"

    async def heard() -> bool:
        driver.add("event 1 119")
        await asyncio.sleep(0.2)
        return not (await device(client, "MIG-2", lambda one: True)).healthy

    await eventually(heard, "the XID is heard", 10)
    sick = await device(client, "MIG-2", ill)
    assert "its system processor does not answer (XID 119)" in sick.reason
    assert "--undo" in sick.reason
    assert (await device(client, "MIG-0", well)).reason == ""
    # The cell that runs there runs on, and can still be committed.
    assert (await replica.append(1, lead["token"]))["ok"]
    refused = await replica.bid(2, gpus=1, model="3g.71gb")
    assert refused["code"] == "impossible"
    assert "XID 119" in refused["reason"]

    before = (await record(client)).pid
    a.kill()
    a.start()

    async def back() -> bool:
        return (await record(client)).pid != before

    await eventually(back, "the daemon is back", 10)
    assert "XID 119" in (await device(client, "MIG-2", ill)).reason
    await close_gpus(client, "a", ["1"], "", undo=True)
    await device(client, "MIG-2", well)
    await replica.ready(1)
    assert (await replica.bid(2, gpus=1, model="3g.71gb"))["answer"] == "lead"


async def test_a_cell_waits_for_a_hot_gpu_is_told_why_and_runs_when_it_has_cooled(
    client: Etcd, host: MakeHost, driver: PlayedNVML
) -> None:
    a = above(host, driver)
    replica = await kernel(client, a, "k")
    driver.play(*machine(temperature=93))
    assert (await device(client, "MIG-1", ill)).passing
    waiting = asyncio.create_task(replica.bid(1, gpus=1, model="1g.18gb", wait=True))

    async def told() -> bool:
        return any("too hot (93 °C" in said["reason"] for said in await replica.pushed("waiting"))

    await eventually(told, "told that it waits for a hot GPU", 5)
    driver.play(*machine(temperature=70))
    assert (await waiting)["answer"] == "lead"


ILLNESSES = [
    (machine(ecc=2), "2 uncorrected memory errors"),
    (machine(rows="0,3,0,1"), "could not be replaced"),
    (machine(recovery=2), "the driver wants a restart of the machine"),
    ([*machine(), f"fault nvmlDeviceGetMemoryInfo 0 {LOST}"], "the device is lost"),
    ([*machine(), "fault nvmlDeviceGetTemperature 0 -1"], "has not answered"),
    ([*machine(), "fault nvmlDeviceGetPowerUsage * 9"], "NVML does not work"),
]


async def test_each_illness_is_told_and_what_is_over_ends_it(client: Etcd, host: MakeHost, driver: PlayedNVML) -> None:
    above(host, driver)
    await device(client, "MIG-0", well)
    for lines, words in ILLNESSES:
        driver.play(*lines)
        assert words in (await device(client, "MIG-0", ill)).reason
        driver.play(*machine())
        await device(client, "MIG-0", well)


async def test_an_admin_takes_a_gpu_out_of_use_and_gives_it_back(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    replica = await kernel(client, a, "k")
    with pytest.raises(DrainFailed, match=r"has no GPU '7'; it has: 0 \(SIM-"):
        await close_gpus(client, "a", ["7"], "dust", undo=False)
    (uuid,) = await close_gpus(client, "a", ["0"], "its fan is changed", undo=False)
    assert (await device(client, uuid, ill)).reason == "its fan is changed"
    assert "its fan is changed" in (await replica.bid(1, gpus=2))["reason"]
    a.kill()
    await client.delete(keys.host("a"))
    a.start()
    assert (await device(client, uuid, ill)).reason == "its fan is changed"
    await close_gpus(client, "a", [uuid], "", undo=True)
    await device(client, uuid, well)
