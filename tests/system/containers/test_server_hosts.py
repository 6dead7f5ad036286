"""Users' servers on hosts: a real spawner with real Engines; the gateway's status is the test's, served over HTTP.

The hosts share this machine's Engine, each through a line of its own that can be cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jupyterhub.orm import Spawner as SpawnerState
from tornado.httpserver import HTTPServer
from tornado.web import Application, HTTPError, RequestHandler

from nbos_cluster import certs
from nbos_spawner.docker_spawner import NBOSDockerSpawner
from tests.system.containers.engine import IMAGE, docker, inspect
from tests.system.etcdserver import eventually

pytestmark = pytest.mark.timeout(120)
ENGINE = "/var/run/docker.sock"


class Line:
    """A TCP port with mutual TLS that leads to the Engine until it is cut."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.ca = certs.make_ca(place)
        self._own = certs.issue(place, "engine", ["127.0.0.1"], client=False, server=True)
        self.hub = certs.issue(place, "hub")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.ca))
        context.load_cert_chain(*self._own)
        context.verify_mode = ssl.CERT_REQUIRED
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, ssl=context)

    def entry(self) -> dict[str, str]:
        cert, key = map(str, self.hub)
        return {"url": f"tcp://127.0.0.1:{self.port}", "ca": str(self.ca), "cert": cert, "key": key}

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_unix_connection(ENGINE)
        self._writers |= {writer, their_writer}

        async def pump(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    to.write(data)
                    await to.drain()
            to.close()

        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(pump(reader, their_writer), pump(their_reader, writer))


class World:
    """Two hosts, what they report, and spawners as the hub has them."""

    def __init__(self, directory: Path) -> None:
        self.lines = {name: Line(directory / name) for name in ("a", "b")}
        self.reports: dict[str, dict[str, Any]] = {
            name: {"name": name, "draining": False, "cpus": 4, "replicas": 0} for name in self.lines
        }
        self.tokens: set[str] = set()
        self.mark = secrets.token_hex(4)
        self.url = ""

    async def open(self) -> None:
        world = self

        class Status(RequestHandler):
            def get(self) -> None:
                if self.request.headers.get("Authorization", "").removeprefix("token ") not in world.tokens:
                    raise HTTPError(403)
                self.finish({"hosts": list(world.reports.values())})

        server = HTTPServer(Application([("/services/nbos/api/status", Status)]))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        server.listen(port, "127.0.0.1")
        self.url = f"http://127.0.0.1:{port}/services/nbos/"
        for line in self.lines.values():
            await line.open()

    def new_api_token(self, **kwargs: Any) -> str:
        assert kwargs["scopes"] == ["access:services!service=nbos"]
        self.tokens.add(token := secrets.token_hex(8))
        return token

    def spawner(self, user: str = "ada", **options: Any) -> NBOSDockerSpawner:
        person = SimpleNamespace(name=user, escaped_name=user, groups=[], url=f"/user/{user}/", settings={})
        person.new_api_token = self.new_api_token
        one = NBOSDockerSpawner(
            user=person,
            image=IMAGE,
            cmd=["python3", "-m", "http.server", "8888"],
            name_template=f"nbos-test-{self.mark}-{{username}}",
            hosts={name: line.entry() for name, line in self.lines.items()},
            gateway_url=self.url,
            pull_policy="never",
            **options,
        )
        one.orm_spawner = SpawnerState(name="")
        one.get_args = list  # type: ignore[method-assign]
        one.get_env = dict  # type: ignore[method-assign]
        return one

    def containers(self) -> list[str]:
        return docker("ps", "--all", "--quiet", "--no-trunc", f"--filter=name=nbos-test-{self.mark}").split()


@pytest.fixture
async def world(tmp_path: Path, image: None) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.open()
    yield world
    for container in world.containers():
        docker("rm", "--force", container, check=False)  # it may be about to go by itself
    await eventually(lambda: world.containers() == [], "no container is left")
    for line in world.lines.values():
        await line.cut()


async def answers(address: tuple[str, int]) -> None:
    async def there() -> bool:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(*address)
            writer.close()
            return True
        return False

    await eventually(there, f"the server answers at {address}")


async def test_servers_spread_over_hosts_with_their_limits_and_answer(world: World) -> None:
    world.reports["a"]["replicas"] = 1
    limits = {"default": {"server_memory": "300M"}}
    one, other = world.spawner("ada", limits=limits), world.spawner("bob")
    await answers(await one.start())
    await answers(await other.start())
    assert (one.host, other.host) == ("b", "a")
    assert inspect(one.object_id)["HostConfig"]["Memory"] == 300 << 20
    assert inspect(one.object_id)["HostConfig"]["CapDrop"] == ["ALL"]
    await one.stop()
    await other.stop()
    await eventually(lambda: world.containers() == [], "both are gone")


async def test_a_restarted_hub_finds_a_server_on_its_host(world: World) -> None:
    before = world.spawner()
    await before.start()
    world.reports[before.host]["draining"] = True
    after = world.spawner()
    after.load_state(before.get_state())
    assert await after.poll() is None
    assert after.host == before.host
    await after.stop()
    assert await after.poll() is not None


async def test_a_host_that_drains_gets_no_server(world: World) -> None:
    world.reports["a"]["draining"] = True
    world.reports["b"]["replicas"] = 100
    one = world.spawner()
    await one.start()
    assert one.host == "b"
    await one.stop()


async def test_a_host_whose_engine_does_not_answer_is_passed_over(world: World) -> None:
    await world.lines["a"].cut()
    one = world.spawner()
    await answers(await one.start())
    assert one.host == "b"
    await one.stop()


async def test_a_server_counts_as_running_until_its_host_is_lost(world: World) -> None:
    one = world.spawner()
    await one.start()
    (container,) = world.containers()
    assert one.host == "a"
    await world.lines["a"].cut()
    assert await one.poll() is None
    del world.reports["a"]
    assert await one.poll() == "host a is lost"
    one.clear_state()
    again = world.spawner()
    again.load_state(one.get_state())
    # The two hosts of this test share one Engine, where a name is taken once.
    docker("rename", container, f"nbos-test-{world.mark}-left")
    await answers(await again.start())
    assert again.host == "b"
    assert again.left_on == {"a"}
    docker("rename", again.object_id, f"nbos-test-{world.mark}-aside")
    docker("rename", container, again.object_name)
    await world.lines["a"].open()
    await again._remove_left()
    assert again.left_on == set()
    assert container not in world.containers()


async def test_a_line_without_the_hubs_certificate_leads_nowhere(world: World) -> None:
    stranger = certs.issue(world.lines["b"].ca.parent, "stranger")
    one = world.spawner()
    one.hosts = {"a": {**world.lines["a"].entry(), "cert": str(stranger[0]), "key": str(stranger[1])}}
    with pytest.raises(Exception, match="a does not answer"):
        await one.start()
    assert world.containers() == []


async def test_no_host_at_all_is_told(world: World) -> None:
    world.reports.clear()
    with pytest.raises(Exception, match="none of those that may has reported"):
        await world.spawner().start()
