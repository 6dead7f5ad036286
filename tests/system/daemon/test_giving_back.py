"""What a cell leaves on a device counts, is asked for when another cell lacks it, and is granted once it is gone."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Host, Replica, create, kernel_spec
from tests.system.etcdserver import eventually

GIB = 1 << 30


async def begin(client: Etcd, host: MakeHost, **options: Any) -> tuple[Host, Replica, Replica, str]:
    """A host with one GPU of 8 GiB, on which the first kernel has left 6; and the GPU's UUID."""
    a = host("a", simulated_devices=1, **options)
    for kernel in ("warm", "other"):
        await create(client, kernel_spec(kernel, "a", owner=kernel))
    warm, other = a.replica("warm", 0), a.replica("other", 0)
    await warm.ready()
    await other.ready()
    lead = await warm.bid(1, gpus=1)
    uuid = lead["grant"]["shares"][0]["uuid"]
    await warm.send("release", n=1, left={uuid: 6 * GIB}, peak={uuid: 7 * GIB})
    assert (await warm.append(1, lead["token"]))["ok"]
    return a, warm, other, uuid


async def asked(replica: Replica, times: int = 1) -> None:
    async def is_asked() -> bool:
        return len(await replica.pushed("give_back")) >= times

    await eventually(is_asked, "it is asked for its memory", 10)


async def told(replica: Replica, text: str) -> None:
    async def is_told() -> bool:
        return any(text in push["reason"] for push in await replica.pushed("waiting"))

    await eventually(is_told, f"it is told that {text}", 10)


async def test_who_waits_says_what_for_and_gets_it_when_it_is_given_back(client: Etcd, host: MakeHost) -> None:
    _, warm, other, uuid = await begin(client, host)
    assert (await other.bid(1, tpcs=4, memory=2 * GIB))["answer"] == "lead", "there is so much room"
    await other.send("release", n=1, left={})
    assert (await other.append(1, (await other.bid(1))["token"]))["ok"]
    assert (await other.bid(2, gpus=1))["code"] == "busy"
    assert await warm.pushed("give_back") == [], "whoever does not wait takes nothing from others"
    waiting = asyncio.create_task(other.bid(2, gpus=1, wait=True))
    await asked(warm)
    await told(other, "it waits for 6.0 GiB of GPU 0 that an idle notebook left there and may give back")
    left = (await warm.send("status"))["gpu"]["left"]
    assert left == [{"replica": 0, "devices": {"0": 6 * GIB}, "away": 0, "stays": ""}]
    assert not waiting.done()
    await warm.send("gave_back", ask="offload", left={uuid: 0}, away=6 * GIB, moved=6 * GIB, stays="", seconds=0.5)
    assert (await waiting)["answer"] == "lead"
    # Its own next cell asks for less than comes back: the room for all of it is reserved.
    assert (await warm.send("bid", **cell(2), resources={"tpcs": 1, "memory": GIB}, away=6 * GIB))["code"] == "busy"
    await other.send("release", n=2, left={uuid: 3 * GIB})
    again = await warm.send("bid", **cell(2), resources={"tpcs": 1, "memory": GIB}, away=6 * GIB)
    assert again["code"] == "busy"
    assert "lack" not in again["reason"]
    assert (await warm.send("bid", **cell(2), resources={"tpcs": 1, "memory": GIB}, away=5 * GIB))["answer"] == "lead"


def cell(n: int) -> dict[str, Any]:
    return {"n": n, "attempt": 1, "kind": "cell", "wait": False, "applied": n - 1}


async def test_the_next_daemon_counts_what_was_left_before_it_was_killed(client: Etcd, host: MakeHost) -> None:
    a, warm, other, _ = await begin(client, host)
    a.kill()
    a.start()
    await warm.ready(1)
    waiting = asyncio.create_task(other.bid(1, gpus=1, wait=True))
    await asked(warm)
    assert not waiting.done()
    pid = (await warm.ready(1))["pid"]
    os.kill(pid, signal.SIGKILL)  # with its process goes its memory
    assert (await waiting)["answer"] == "lead"


async def test_a_process_that_keeps_it_is_restarted_where_the_site_says_so(client: Etcd, host: MakeHost) -> None:
    a, warm, other, uuid = await begin(client, host, GivingBack={"at_most": "restart"})
    pid = (await warm.ready(1))["pid"]
    waiting = asyncio.create_task(other.bid(1, gpus=1, wait=True))
    await asked(warm)
    await warm.send("gave_back", ask="offload", left={uuid: 6 * GIB}, stays="a CUDA graph was captured")
    assert (await waiting)["answer"] == "lead"
    assert (await warm.ready(1))["pid"] != pid
    assert "what stays: a CUDA graph was captured" in a.log.read_text()


async def test_a_process_that_does_not_answer_is_given_up_after_a_while_and_that_is_said(
    client: Etcd, host: MakeHost
) -> None:
    _, warm, other, _ = await begin(client, host, GivingBack={"at_most": "offload", "within": 1.0})
    waiting = asyncio.create_task(other.bid(1, gpus=1, wait=True))
    await asked(warm)
    await told(other, "an idle notebook does not give back")
    assert not waiting.done()
    lead = await warm.bid(2, gpus=1)  # its own cell has it within its grant
    assert lead["code"] == "busy", "somebody waits, and goes first"
    assert (await other.send("cancel", n=1))["ok"]
    assert (await waiting)["code"] == "cancelled"
    assert (await warm.bid(2, gpus=1))["answer"] == "lead"
