"""Real replicas of real daemons on a real etcd: what the two sides of the socket promise each other holds together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from nbos_cluster import keys
from nbos_cluster.etcd import Etcd
from tests.system.daemon.site import Host, create, grants_of, kernel_spec, view_of
from tests.system.etcdserver import EtcdServer, eventually
from tests.system.fake_daemon import Client


@pytest.fixture
def hosts(tmp_path: Path, etcd: EtcdServer) -> Iterator[list[Host]]:
    import sys

    command = [sys.executable, "-m", "nbos_kernel"]
    hosts = [Host(tmp_path, name, etcd.endpoint, replica_command=command).start() for name in "ab"]
    yield hosts
    for host in hosts:
        host.end()


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Etcd]:
    async with Etcd([etcd.endpoint]) as opened:
        yield opened


async def attach(host: Host, index: int) -> Client:
    file = host.folder("k", index) / "connection.json"
    await eventually(file.exists, f"{file} is there")
    return await asyncio.to_thread(lambda: Client(str(file)).ready())


async def begin(client: Etcd, hosts: list[Host], **fields: Any) -> list[Client]:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    spec = kernel_spec("k", "a", "b", **fields)
    await create(client, msgspec.structs.replace(spec, curve_publickey=public, curve_secretkey=secret))
    return [await attach(host, index) for index, host in enumerate(hosts)]


async def applied(client: Etcd, replica: int, n: int) -> None:
    async def there() -> bool:
        record = (await view_of(client, "k")).replicas.get(replica)
        return record is not None and record.applied >= n

    await eventually(there, f"replica {replica} applied {n}")


def pid(host: Host, index: int) -> int:
    return int(json.loads((host.folder("k", index) / "process.json").read_text())["pid"])


async def test_a_killed_executors_variables_are_on_the_other_host(client: Etcd, hosts: list[Host]) -> None:
    first, second = await begin(client, hosts)
    run = asyncio.to_thread
    await run(first.run, "import numpy as np\na = np.arange(200_000); v = a[7:]; box = [a]\ng = (i for i in box)", 1)
    await run(first.run, "def f(): return a.sum()", 2)
    await applied(client, 1, 2)
    os.kill(pid(hosts[0], 0), signal.SIGKILL)

    async def free() -> bool:
        """Entry 2 may have claimed 3 ahead for the one that was killed; its daemon gives that back."""
        return await client.get(keys.claim("k", 3)) is None

    await eventually(free, "the next number is nobody's")
    await run(second.run, "a[7] = -1; assert v[0] == -1 and box[0] is a", 3)
    assert "generator" in (await run(second.run, "g", 4))["content"]["evalue"]
    again = await attach(hosts[0], 0)
    await applied(client, 0, 4)
    assert await run(again.value, "int(f()) == a.sum() and box[0] is a", 5) == "True"
    for one in (first, second, again):
        one.close()


async def test_a_grant_is_held_for_the_cell_and_given_back(client: Etcd, hosts: list[Host]) -> None:
    first, _ = await begin(client, hosts)
    reply = await asyncio.to_thread(first.run, "%%gpu tpcs=4\nimport nbos_kernel\nn = nbos_kernel.grant().tpcs", 1)
    assert reply["content"]["status"] == "ok"
    assert await grants_of(client, "a") == []
    assert await asyncio.to_thread(first.value, "n", 2) == "4"


async def test_cells_go_on_after_the_daemon_was_killed(client: Etcd, hosts: list[Host]) -> None:
    first, _ = await begin(client, hosts)
    await asyncio.to_thread(first.run, "a = 1", 1)
    before = pid(hosts[0], 0)
    hosts[0].kill()
    hosts[0].start()

    def connected() -> bool:
        return bool(first.control("nbos_status_request", {})["content"]["status"] == "ok")

    await eventually(lambda: asyncio.to_thread(connected), "the new daemon answers")
    assert await asyncio.to_thread(first.value, "a", 2) == "1"
    assert pid(hosts[0], 0) == before
