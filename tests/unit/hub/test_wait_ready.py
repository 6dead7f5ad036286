"""What a request with `wait=ready` is held open for: a ready replica at once, other news after a while."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Literal, cast

import pytest
from msgspec import structs
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from nbos_cluster import keys
from nbos_cluster.kv import Changes, Snapshot
from nbos_spawner.gateway import handlers
from nbos_spawner.gateway.auth import Caller
from nbos_spawner.gateway.config import GatewayConfig
from nbos_spawner.gateway.copy import ClusterCopy
from nbos_spawner.gateway.kernels import Kernels
from nbos_spawner.gateway.watching import ClusterWatch

from .cluster_data import kernel_kvs, put, replica, spec


class PlayedEtcd:
    """Its watches say what the test puts into them."""

    def __init__(self) -> None:
        self.watches: dict[str, asyncio.Queue[Snapshot | Changes]] = {
            prefix: asyncio.Queue() for prefix in (keys.HOSTS, keys.QUEUES, keys.KERNELS)
        }

    async def watch(self, prefix: str) -> AsyncIterator[Snapshot | Changes]:
        while True:
            yield await self.watches[prefix].get()


class Ada:
    """The one who asks, whoever it is."""

    async def caller(self, _: Any) -> Caller:
        return Caller("ada", "user", admin=False, kernels=True)


class Gateway:
    """The handlers of one kernel, served."""

    def __init__(self) -> None:
        self.etcd, self.copy = PlayedEtcd(), ClusterCopy()
        watch = self.watch = ClusterWatch(cast(Any, self.etcd), self.copy)
        kernels = Kernels(cast(Any, self.etcd), self.copy, watch, GatewayConfig((), None, "", 0, "/"))
        parts = {"kernels": kernels, "watch": watch, "users": Ada()}
        self.server = HTTPServer(Application([(r"/(.+)", handlers.KernelHandler, parts)]))
        (socket,) = bind_sockets(0, "127.0.0.1")
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}/k?wait=ready&after="
        self.server.add_sockets([socket])

    async def open(self) -> None:
        await self.watch.start()
        for queue in self.etcd.watches.values():
            queue.put_nowait(Snapshot([], 1))
        self.etcd.watches[keys.KERNELS].put_nowait(Snapshot(kernel_kvs(spec("k")), 1))
        await self.watch.until(lambda: self.copy.kernel("k") is not None, 10)

    async def says(self, revision: int, state: Literal["starting", "ready"]) -> None:
        """The record of the kernel's first replica; the gateway has seen it afterwards."""
        record = structs.replace(replica(0, "a"), state=state, reason=f"as of {revision}")
        self.etcd.watches[keys.KERNELS].put_nowait(put(keys.replica("k", 0), record, revision))
        view = self.copy.kernel("k")
        assert view is not None
        assert await self.watch.until(lambda: view.members_rev == revision, 10)

    async def asked(self, after: int) -> dict[str, Any]:
        answer = await AsyncHTTPClient().fetch(f"{self.url}{after}", request_timeout=20)
        return cast(dict[str, Any], json.loads(answer.body))

    def state(self, model: dict[str, Any]) -> str:
        return str(next(member["state"] for member in model["members"] if member["index"] == 0))

    async def close(self) -> None:
        self.server.stop()
        for task in self.watch.tasks:
            task.cancel()
        await asyncio.gather(*self.watch.tasks, return_exceptions=True)


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    made = Gateway()
    await made.open()
    yield made
    await made.close()


async def test_news_do_not_answer_before_their_time_and_a_ready_replica_does(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "NEWS_AFTER", 15.0)
    asked = asyncio.create_task(gateway.asked(after=0))
    for revision in (2, 3):
        await gateway.says(revision, "starting")
    assert not asked.done()
    await gateway.says(4, "ready")
    assert gateway.state(await asyncio.wait_for(asked, 10)) == "ready"


async def test_news_answer_once_it_is_time(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "NEWS_AFTER", 0.01)
    await gateway.says(2, "starting")
    known = await gateway.asked(after=0)
    asked = asyncio.create_task(gateway.asked(after=known["revision"]))
    await gateway.says(3, "starting")
    assert (await asked)["revision"] == 3
