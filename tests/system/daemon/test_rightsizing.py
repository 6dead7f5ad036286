"""Right-sizing through a real daemon: what it learnt from executions, it grants; what was learnt outlives it."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import msgspec
import zmq

from gpu_daemon.rightsizing import BASE
from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Replica, create, kernel_spec, view_of
from tests.system.etcdserver import eventually
from tests.system.fake_daemon import Client

SIMULATED = {"simulated_devices": 1, "simulated_tpcs": 64, "simulated_memory": "64G"}
ASKED = {"gpus": 0, "tpcs": 32, "memory": 0, "model": ""}


async def execute(replica: Replica, n: int, code: str, asked: dict[str, Any] = ASKED) -> dict[str, Any]:
    """One execution that takes 1 s whatever it is granted; returns its grant."""
    bid = {"n": n, "attempt": 1, "kind": "cell", "resources": asked, "wait": False, "applied": n - 1, "code": code}
    answer = await replica.send("bid", **bid)
    assert answer["answer"] == "lead", answer
    await replica.send("release", n=n, took={"seconds": 1.0, "unit": "cell", "whole": 1.0})
    assert (await replica.append(n, answer["token"]))["ok"]
    grant: dict[str, Any] = answer["grant"]
    return grant


def tpcs(grant: dict[str, Any]) -> int:
    return len(grant["shares"][0]["tpcs"])


async def test_fewer_tpcs_with_the_same_memory_after_some_executions_also_after_a_restart(
    client: Etcd, host: MakeHost
) -> None:
    a = host("a", stop_replicas_on_exit=False, **SIMULATED)
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    grants = [await execute(replica, n, "c0ffee") for n in range(1, 15)]
    assert [tpcs(g) for g in grants[:BASE]] == [32] * BASE
    assert tpcs(grants[-1]) <= 8
    assert {g["shares"][0]["memory"] for g in grants} == {32 << 30}
    assert grants[-1]["asked"] == 32
    assert "32 TPCs" in grants[-1]["why"]
    assert tpcs(await execute(replica, 15, "")) == 32, "no fingerprint: exactly what was asked"
    assert tpcs(await execute(replica, 16, "beef")) == 32, "another cell is not known"
    whole = {**ASKED, "gpus": 1, "tpcs": 0}
    assert (await execute(replica, 17, "c0ffee", whole))["asked"] == 0, "a whole device stays whole"
    a.kill(signal.SIGTERM)
    a.start()

    async def connected() -> bool:
        return (await replica.send("status"))["ok"] is True

    await eventually(connected, "the replica is connected again", 10)
    assert tpcs(await execute(replica, 18, "c0ffee")) <= 8


async def test_nonsense_about_durations_is_not_learnt_from(client: Etcd, host: MakeHost) -> None:
    a = host("a", **SIMULATED)
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    for n, took in enumerate((None, 3, {}, {"seconds": -1.0}, {"seconds": 2.0, "unit": "cell", "whole": 1.0}), 1):
        bid = {"n": n, "attempt": 1, "kind": "cell", "resources": ASKED, "wait": False, "applied": n - 1, "code": "c"}
        answer = await replica.send("bid", **bid)
        assert (await replica.send("release", n=n, took=took))["ok"]
        assert (await replica.append(n, answer["token"]))["ok"]
        assert "execution 1 of" in answer["grant"]["why"]


async def test_switched_off_everybody_gets_what_they_ask_for(client: Etcd, host: MakeHost) -> None:
    a = host("a", allowed_slowdown=0.0, **SIMULATED)
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    assert {tpcs(await execute(replica, n, "c0ffee")) for n in range(1, 10)} == {32}


async def test_a_real_kernels_simulated_work_is_made_smaller_unless_it_says_exact(client: Etcd, host: MakeHost) -> None:
    command = [sys.executable, "-m", "nbos_kernel"]
    # Generous, since machines that run tests are busy: sleeps take longer than they should.
    a = host("a", replica_command=command, allowed_slowdown=0.5, **SIMULATED)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    spec = msgspec.structs.replace(kernel_spec("k", "a"), curve_publickey=public, curve_secretkey=secret)
    await create(client, spec)
    file = a.folder("k", 0) / "connection.json"
    await eventually(file.exists, f"{file} is there")
    kernel = await asyncio.to_thread(lambda: Client(str(file)).ready())

    async def applied() -> bool:
        record = (await view_of(client, "k")).replicas.get(0)
        return record is not None and record.applied == 0

    await eventually(applied, "it has the state to begin with")
    work = "from nbos_kernel import grant, simgpu\nsimgpu.run(work=0.2, serial=0.2)\ng = grant()\n"
    for n in range(1, 11):
        assert (await asyncio.to_thread(kernel.run, "%%gpu tpcs=32\n" + work, n))["content"]["status"] == "ok"
    assert int(await asyncio.to_thread(kernel.value, "g.tpcs", 11)) <= 24
    assert "of 32 TPCs" in await asyncio.to_thread(kernel.value, "g.why", 12)
    await asyncio.to_thread(kernel.run, "%%gpu tpcs=32 exact\n" + work, 13)
    assert await asyncio.to_thread(kernel.value, "(g.tpcs, g.asked)", 14) == "(32, 0)"
    await asyncio.to_thread(kernel.run, "%nbos rightsizing off", 15)
    await asyncio.to_thread(kernel.run, "%%gpu tpcs=32\n" + work, 16)
    assert await asyncio.to_thread(kernel.value, "g.tpcs", 17) == "32"
    # The grant bounds the simulated memory, and a broken simulated device fails the cell, not the kernel.
    reply = await asyncio.to_thread(kernel.run, "%%gpu tpcs=2 mem=1G\nsimgpu.allocate('2G')", 18)
    assert reply["content"]["ename"] == "OutOfMemory"
    reply = await asyncio.to_thread(kernel.run, "%%gpu tpcs=2 mem=1G\nsimgpu.fault('XID 79'); simgpu.run(1)", 19)
    assert reply["content"]["ename"] == "DeviceFault"
    assert await asyncio.to_thread(kernel.value, "1 + 1", 20) == "2"
    kernel.close()
