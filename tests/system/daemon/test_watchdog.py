"""A real daemon above a played driver: who uses a device beyond their grant is warned, interrupted and restarted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nbos_cluster.etcd import Etcd
from tests.fakes.nvml import PlayedNVML, gpu, mig
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Host, Replica, create, kernel_spec, view_of
from tests.system.etcdserver import eventually

QUICK = {"grace": 1.0, "patience": 1.0, "every": 0.1}


@pytest.fixture
def driver(tmp_path: Path) -> PlayedNVML:
    return PlayedNVML(tmp_path, *machine())


def machine(**first: Any) -> list[str]:
    """A GPU with one instance of 18 GiB."""
    return [gpu(0, mig=1), mig(0, **first)]


async def begin(client: Etcd, host: MakeHost, driver: PlayedNVML, **policy: Any) -> tuple[Host, Replica, int]:
    a = host("a", devices="nvml", environment=driver.environment, Watchdog={**QUICK, **policy})
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    return a, replica, (await replica.ready())["pid"]


async def told(replica: Replica) -> list[str]:
    return [message["stage"] for message in await replica.pushed("gpu_misuse")]


async def test_a_replica_beyond_its_budget_is_restarted_in_the_end(
    client: Etcd, host: MakeHost, driver: PlayedNVML
) -> None:
    _, replica, pid = await begin(client, host, driver)
    assert (await replica.bid(1, tpcs=4, memory=4 << 30))["answer"] == "lead"
    driver.play(*machine(procs=f"{pid}:{9 << 30}:7"))

    async def interrupted() -> bool:
        return await told(replica) == ["warn", "interrupt"]

    await eventually(interrupted, "it is warned, then interrupted", 10)
    (first, _) = await replica.pushed("gpu_misuse")
    assert "uses 9.0 GiB" in first["text"]
    assert "its budget is 4.0 GiB" in first["text"]

    async def abandoned() -> bool:
        return (await view_of(client, "k")).last == 1

    await eventually(abandoned, "its claim ends with its process", 10)
    entry = (await view_of(client, "k")).log[1]
    assert entry.kind == "abandoned"
    assert "its budget is 4.0 GiB" in entry.reason
    assert (await replica.ready(1))["pid"] != pid
    assert (await replica.bid(2, tpcs=8))["answer"] == "lead", "the grant was given back"


async def test_a_replica_that_computes_without_a_grant_is_warned_and_no_more_where_the_policy_says_so(
    client: Etcd, host: MakeHost, driver: PlayedNVML
) -> None:
    a, replica, pid = await begin(client, host, driver, without_grant="warn")
    driver.play(*machine(procs=f"{pid}:{1 << 20}:7,1:1000:7", busy=f"{pid}:40"))

    async def warned() -> bool:
        return await told(replica) == ["warn"]

    await eventually(warned, "it is warned", 10)
    assert "computes on GPU MIG-0 without holding a grant" in (await replica.pushed("gpu_misuse"))[0]["text"]
    await asyncio.sleep(2.5)  # what must not happen has time to
    assert await told(replica) == ["warn"]
    assert (await replica.ready())["pid"] == pid
    assert a.log.read_text().count("process 1 uses GPU MIG-0 and is no replica's") == 1


async def test_a_replica_within_its_grant_is_left_alone(client: Etcd, host: MakeHost, driver: PlayedNVML) -> None:
    _, replica, pid = await begin(client, host, driver)
    lead = await replica.bid(1, tpcs=8)
    driver.play(*machine(procs=f"{pid}:{18 << 30}:7", busy=f"{pid}:100"))
    await asyncio.sleep(2.0)
    driver.play(*machine(procs=f"{pid}:{18 << 30}:7", busy=f"{pid}:0"))  # what the cell leaves stays
    await replica.send("release", n=1)
    assert (await replica.append(1, lead["token"]))["ok"]
    await asyncio.sleep(2.5)
    assert await told(replica) == []
    assert (await replica.ready(1))["pid"] == pid
