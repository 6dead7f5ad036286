"""A real daemon above played drivers: what an idle process keeps on a GPU is checkpointed for another cell, and is
back, on this GPU or another, before anything runs in it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import HostRecord
from tests.fakes import cuda
from tests.fakes.nvml import PlayedNVML, gpu
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Host, Replica, create, kernel_spec
from tests.system.etcdserver import eventually

GIB = 1 << 30
UUIDS = ["GPU-00000000-0000-0000-0000-0000000000aa", "GPU-00000000-0000-0000-0000-0000000000bb"]


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """Where the played driver keeps the states of processes."""
    folder = tmp_path / "states"
    folder.mkdir()
    return folder


class Site:
    """A host with so many GPUs; the kernel `warm` has 1 GiB on the first, which its process does not offload."""

    def __init__(self, a: Host, warm: Replica, other: Replica, pid: int) -> None:
        self.a, self.warm, self.other, self.pid = a, warm, other, pid

    async def asked(self, tier: str) -> None:
        async def is_asked() -> bool:
            return tier in [push["ask"] for push in await self.warm.pushed("give_back")]

        await eventually(is_asked, f"it is asked for {tier}", 15)

    async def freeze(self) -> asyncio.Task[Any]:
        """The other kernel's cell waits for the GPU, and what is asked of the first is answered."""
        waiting = asyncio.create_task(self.other.bid(1, gpus=1, wait=True))
        await self.asked("offload")
        stays = "a CUDA graph was captured"
        await self.warm.send("gave_back", ask="offload", left={UUIDS[0]: GIB}, stays=stays)
        await self.asked("checkpoint")
        number = (await self.warm.pushed("give_back"))[-1]["number"]
        await self.warm.send("gave_back", ask="checkpoint", number=number - 1)  # an old answer is none
        await self.warm.send("gave_back", ask="checkpoint", number=number)
        return waiting


async def begin(client: Etcd, host: MakeHost, tmp_path: Path, states: Path, gpus: int = 1, old: bool = False) -> Site:
    uuids = UUIDS[:gpus]
    nvml = PlayedNVML(tmp_path, *(gpu(i, uuid=uuid, memory=2 * GIB, used=0) for i, uuid in enumerate(uuids)))
    environ = dict(nvml.environment)
    environ["LD_LIBRARY_PATH"] = f"{cuda.built(old).name}:{environ['LD_LIBRARY_PATH']}"
    environ["FAKE_CUDA_CHECKPOINTS"] = str(states)
    environ["FAKE_CUDA_GPUS"] = ",".join(uuid.removeprefix("GPU-") for uuid in uuids)
    a = host("a", devices="nvml", environment=environ, Watchdog={"every": 0})
    for kernel in ("warm", "other"):
        await create(client, kernel_spec(kernel, "a", owner=kernel))
    warm, other = a.replica("warm", 0), a.replica("other", 0)
    pid = (await warm.ready())["pid"]
    await other.ready()
    lead = await warm.bid(1, gpus=1)
    assert lead["grant"]["shares"][0]["uuid"] == UUIDS[0]
    await warm.send("release", n=1, left={UUIDS[0]: GIB}, peak={UUIDS[0]: GIB})
    assert (await warm.append(1, lead["token"]))["ok"]
    if gpus > 1:
        await create(client, kernel_spec("third", "a", owner="third"))
        third = a.replica("third", 0)
        await third.ready()
        assert (await third.bid(1, gpus=1))["answer"] == "lead"  # the second GPU
    return Site(a, warm, other, pid)


def state(states: Path, pid: int) -> str:
    return (states / str(pid)).read_text().split("\n")[0]


async def test_what_stays_after_an_offload_is_checkpointed_and_back_before_the_next_cell(
    client: Etcd, host: MakeHost, tmp_path: Path, states: Path
) -> None:
    site = await begin(client, host, tmp_path, states)
    waiting = await site.freeze()
    assert (await waiting)["answer"] == "lead"
    assert state(states, site.pid) == "2"

    async def shown() -> bool:
        record = records.decode((await client.get(keys.host("a"))).value, HostRecord)
        return [(one.kernel, one.tier, one.memory) for one in record.left] == [("warm", "checkpoint", 2 * GIB)]

    await eventually(shown, "the host's record says where it is", 10)
    assert (await site.warm.bid(2))["code"] == "busy", "a cell without a GPU might call CUDA, too"
    own = asyncio.create_task(site.warm.bid(2, wait=True))

    async def told() -> bool:
        return bool(await site.warm.pushed("waiting"))

    await eventually(told, "it waits, and is told why", 10)
    await site.other.send("release", n=1, left={UUIDS[0]: 0})
    assert (await own)["answer"] == "lead"
    assert state(states, site.pid) == "0"
    assert [push["type"] for push in await site.warm.pushed("thawed")] == ["thawed"]


async def test_the_next_daemon_thaws_what_the_last_one_froze(
    client: Etcd, host: MakeHost, tmp_path: Path, states: Path
) -> None:
    site = await begin(client, host, tmp_path, states)
    waiting = await site.freeze()
    lead = await waiting
    site.a.kill()
    site.a.start()
    await site.warm.ready(1)
    await site.other.ready()
    assert (await site.warm.bid(2))["code"] == "busy", "the other's grant was found again"
    assert (await site.other.append(1, lead["token"]))["ok"]
    assert (await site.warm.bid(2, wait=True))["answer"] == "lead"
    assert state(states, site.pid) == "0"


async def test_it_comes_back_on_another_gpu_of_its_kind_where_that_is_free_first(
    client: Etcd, host: MakeHost, tmp_path: Path, states: Path
) -> None:
    site = await begin(client, host, tmp_path, states, gpus=2)
    assert (await (await site.freeze()))["answer"] == "lead"
    own = asyncio.create_task(site.warm.bid(2, gpus=1, wait=True))
    third = site.a.replica("third", 0)
    await third.send("release", n=1, left={UUIDS[1]: 0})
    assert (await own)["grant"]["shares"][0]["uuid"] == UUIDS[1]
    lines = (states / str(site.pid)).read_text().split()
    assert lines == ["0"]
    (moved,) = await site.warm.pushed("gpu_moved")
    assert (moved["from"], moved["to"]) == (UUIDS[0], UUIDS[1])


async def test_a_restore_that_fails_ends_the_process_which_starts_again_from_the_log(
    client: Etcd, host: MakeHost, tmp_path: Path, states: Path
) -> None:
    site = await begin(client, host, tmp_path, states)
    assert (await (await site.freeze()))["answer"] == "lead"
    (states / "fail").write_text("cuCheckpointProcessRestore:2")
    await site.other.send("release", n=1, left={UUIDS[0]: 0})
    answer = await site.warm.bid(2, wait=True)
    assert answer is None or answer["answer"] == "yield"
    (states / "fail").write_text("")

    async def anew() -> bool:
        return bool((await site.warm.ready(1))["pid"] != site.pid)

    await eventually(anew, "a new process is there", 15)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in site.a.log.read_text()
    assert (await site.warm.bid(2, gpus=1, wait=True))["answer"] == "lead"


async def test_where_the_driver_refuses_the_process_runs_on_and_that_is_said(
    client: Etcd, host: MakeHost, tmp_path: Path, states: Path
) -> None:
    site = await begin(client, host, tmp_path, states)
    (states / "fail").write_text("cuCheckpointProcessLock:800")
    waiting = await site.freeze()

    async def said() -> bool:
        return any("does not give back" in push["reason"] for push in await site.other.pushed("waiting"))

    await eventually(said, "who waits is told", 15)
    assert "CAP_SYS_PTRACE" in site.a.log.read_text()
    assert len(await site.warm.pushed("thawed")) == 1
    assert (await site.other.send("cancel", n=1))["ok"]
    assert (await waiting)["code"] == "cancelled"
    assert (await site.warm.bid(2, gpus=1))["answer"] == "lead"


async def test_a_driver_that_is_too_old_is_said_at_the_start_and_nothing_is_checkpointed(
    client: Etcd, host: MakeHost, tmp_path: Path, states: Path
) -> None:
    site = await begin(client, host, tmp_path, states, old=True)
    assert "checkpoints not: the NVIDIA driver has no cuCheckpointProcessGetState" in site.a.log.read_text()
