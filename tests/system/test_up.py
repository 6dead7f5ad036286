"""One `nbos up`, driven over REST as a client would: who may do what, what is refused how, what survives what.

The tests share one cluster and leave it working; the last ones end it and start it again.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse

from tests.system.cluster import Cluster
from tests.system.hubclient import Hub, HubError, eventually
from tests.system.nbosenv import environment

PLAIN = {"kernel_id": "plain-1", "replicas": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="nbos-up-") as folder:
        one = Cluster(Path(folder) / "state", "--gpus", "1")
        one.start()
        try:
            yield one
        finally:
            assert not one.stop(), "processes were left"


@pytest.fixture
async def ada(cluster: Cluster) -> Hub:
    """The hub as user ada sees it."""
    return await user(cluster, "ada")


async def user(cluster: Cluster, name: str) -> Hub:
    hub = cluster.hub
    await hub.add_user(name)
    return hub.as_user(await hub.user_token(name))


async def send(cluster: Cluster, method: str, path: str, **options: Any) -> HTTPResponse:
    """One request to the gateway as it stands, without a token unless `headers` has one."""
    request = HTTPRequest(
        f"http://127.0.0.1:{cluster.port}/services/nbos/{path}",
        method=method,
        allow_nonstandard_methods=True,
        follow_redirects=False,
        request_timeout=30,
        **options,
    )
    return await AsyncHTTPClient().fetch(request, raise_error=False)


async def refused(asking: Any, status: int, code: str) -> None:
    with pytest.raises(HubError) as caught:
        await asking
    assert (caught.value.status, json.loads(caught.value.body)["error"]) == (status, code), caught.value.body


async def healthy(cluster: Cluster, timeout: float = 30.0) -> None:
    async def answers() -> bool:
        return (await send(cluster, "GET", "api/health")).code == 200

    await eventually(answers, "the gateway is healthy", timeout)


async def test_a_person_logs_in_with_the_printed_password_and_sees_the_dashboard(cluster: Cluster) -> None:
    password = (cluster.state_dir / "password").read_text().strip()

    async def printed() -> bool:
        return password in cluster.log.read_text()

    await eventually(printed, "the password is printed", 10)
    browser = Browser(f"http://127.0.0.1:{cluster.port}")
    page = await browser.get("/hub/login")
    found = re.search(r'name="_xsrf" value="([^"]+)"', page)
    assert found
    form = {"username": "grace", "password": password, "_xsrf": found[1]}
    await browser.post("/hub/login", form)
    dashboard = await browser.get("/services/nbos/")
    assert "host-1" in dashboard
    assert "<h1>NBOS</h1>" in dashboard


async def test_a_wrong_password_does_not_log_in(cluster: Cluster) -> None:
    browser = Browser(f"http://127.0.0.1:{cluster.port}")
    found = re.search(r'name="_xsrf" value="([^"]+)"', await browser.get("/hub/login"))
    assert found
    await browser.post("/hub/login", {"username": "grace", "password": "guess", "_xsrf": found[1]}, status=403)


async def test_without_a_token_nothing_is_told(cluster: Cluster) -> None:
    for path in ("api/kernels", "api/status", "api/kernels/x"):
        assert (await send(cluster, "GET", path)).code == 401


async def test_a_forged_token_is_refused(cluster: Cluster) -> None:
    reply = await send(cluster, "GET", "api/kernels", headers={"Authorization": "token 0123456789abcdef"})
    assert reply.code == 403
    assert json.loads(reply.body)["error"] == "unknown_token"


async def test_a_token_that_may_not_use_nbos_is_refused(cluster: Cluster) -> None:
    await cluster.hub.add_user("ada")
    narrow = cluster.hub.as_user(await cluster.hub.user_token("ada", ["read:users:name!user"]))
    await refused(narrow.service("GET", "nbos/api/kernels"), 403, "scope")


async def test_a_kernel_is_made_once_shown_restarted_and_deleted(ada: Hub) -> None:
    made = await ada.service("POST", "nbos/api/kernels", PLAIN)
    again = await ada.service("POST", "nbos/api/kernels", PLAIN)
    assert made["connection"] == again["connection"]
    ready = await ada.service("GET", "nbos/api/kernels/plain-1?wait=ready")
    assert any(member["state"] == "ready" for member in ready["members"])
    restarted = await ada.service("POST", "nbos/api/kernels/plain-1/restart", {})
    assert restarted["incarnation"] == made["incarnation"] + 1
    await ada.service("DELETE", "nbos/api/kernels/plain-1")
    await refused(ada.service("GET", "nbos/api/kernels/plain-1"), 404, "no_such_kernel")


async def test_another_users_kernel_and_none_look_the_same(cluster: Cluster, ada: Hub) -> None:
    eve = await user(cluster, "eve")
    await ada.service("POST", "nbos/api/kernels", {"kernel_id": "hers", "replicas": 1})
    try:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/restart")):
            for kernel in ("hers", "nobodys"):
                await refused(eve.service(method, f"nbos/api/kernels/{kernel}{path}", {}), 404, "no_such_kernel")
        await refused(eve.service("POST", "nbos/api/kernels", {"kernel_id": "hers"}), 403, "taken")
        assert await eve.service("GET", "nbos/api/kernels") == []
        assert not (await eve.service("GET", "nbos/api/status"))["kernels"]
        seen = await cluster.hub.service("GET", "nbos/api/kernels/hers")
        assert "connection" not in seen  # an administrator sees that it is there, not its keys
    finally:
        await ada.service("DELETE", "nbos/api/kernels/hers")


async def test_bounds_hold_for_requests_and_for_the_spawner(cluster: Cluster, ada: Hub) -> None:
    await refused(ada.service("POST", "nbos/api/kernels", {"kernel_id": "k", "replicas": 6}), 403, "over_limit")
    body = {"kernel_id": "k", "resources": {"gpus": 99}}
    await refused(ada.service("POST", "nbos/api/kernels", body), 403, "over_limit")
    with pytest.raises(HubError, match="your limit is 5") as caught:
        await cluster.hub.start_server("greedy", {"replicas": 9})
    assert caught.value.status == 400


async def test_malformed_requests_are_refused_with_the_field(cluster: Cluster, ada: Hub) -> None:
    for body in ({}, {"kernel_id": "../x"}, {"kernel_id": "k", "replicas": "many"}, {"kernel_id": "k", "no": 1}):
        await refused(ada.service("POST", "nbos/api/kernels", body or {"replicas": 1}), 400, "malformed")
    token = {"Authorization": f"token {ada.token}"}
    for raw in (b"{", b"\xff", b"[]"):
        assert (await send(cluster, "POST", "api/kernels", headers=token, body=raw)).code == 400
    assert (await send(cluster, "GET", "api/kernels/k?wait=forever", headers=token)).code == 400
    assert (await send(cluster, "GET", "api/nothing", headers=token)).code == 404
    assert (await send(cluster, "PUT", "api/kernels", headers=token, body=b"{}")).code == 405


@pytest.mark.parametrize("size", [1 << 20, 8 << 20])
async def test_an_oversized_request_is_refused_with_413(cluster: Cluster, ada: Hub, size: int) -> None:
    body = b'{"kernel_id": "' + b"x" * size + b'"}'
    reply = await send(cluster, "POST", "api/kernels", headers={"Authorization": f"token {ada.token}"}, body=body)
    assert reply.code == 413
    assert json.loads(reply.body)["error"] == "too_large"


async def test_the_server_gets_no_credential_but_its_own_token(cluster: Cluster) -> None:
    await cluster.hub.start_server("ada")
    server = next(p for p in cluster.processes(lambda line: "jupyterhub.singleuser" in line))
    env = server.environ()
    assert not [name for name in env if "ETCD" in name or "CONFIGPROXY" in name or "LIMITS" in name]
    as_server = cluster.hub.as_user(env["JUPYTERHUB_API_TOKEN"])
    assert isinstance(await as_server.service("GET", "nbos/api/kernels"), list)
    with pytest.raises(HubError):
        await as_server.api("GET", "users")


async def test_a_killed_gateway_is_back_in_seconds(cluster: Cluster, ada: Hub) -> None:
    await ada.service("POST", "nbos/api/kernels", PLAIN)
    gateway = cluster.gateway()
    gateway.kill()
    gateway.wait(5)
    await healthy(cluster, 15.0)
    assert (await ada.service("GET", "nbos/api/kernels/plain-1"))["kernel_id"] == "plain-1"


async def test_a_killed_hub_comes_back_and_servers_live_on(cluster: Cluster, ada: Hub) -> None:
    await cluster.hub.start_server("ada")
    server = next(p for p in cluster.processes(lambda line: "jupyterhub.singleuser" in line))
    client, hub = cluster.hub, cluster.hub_process()
    hub.kill()
    hub.wait(5)
    await client.ready()
    await healthy(cluster)
    assert server.is_running()
    model = await client.api("GET", "users/ada")
    assert model["servers"][""]["ready"]
    assert cluster.hub_process().pid != hub.pid


async def test_a_killed_daemon_is_back_and_its_host_with_it(cluster: Cluster) -> None:
    before = await asyncio.to_thread(cluster.daemon_pid, "host-2")
    os.kill(before, signal.SIGKILL)

    async def again() -> bool:
        status = await cluster.hub.service("GET", "nbos/api/status")
        return any(h["name"] == "host-2" and h["pid"] != before for h in status["hosts"])

    await eventually(again, "host-2 is back", 20)


def test_a_second_up_on_the_same_directory_is_a_clear_error(cluster: Cluster) -> None:
    done = run_up(cluster, "--port", "1")
    assert done.returncode == 1
    assert "already running" in done.stderr
    assert "--state-dir" in done.stderr


def test_a_port_in_use_is_a_clear_error(cluster: Cluster, tmp_path: Path) -> None:
    done = run_up(cluster, "--port", str(cluster.port), state_dir=tmp_path / "other")
    assert done.returncode == 1
    assert f"port {cluster.port}" in done.stderr
    assert "--port" in done.stderr


def run_up(cluster: Cluster, *options: str, state_dir: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nbos.cli", "up", "--state-dir", str(state_dir or cluster.state_dir), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)


async def test_ctrl_c_leaves_no_process_and_the_next_up_brings_kernels_back(cluster: Cluster, ada: Hub) -> None:
    await ada.service("POST", "nbos/api/kernels", PLAIN)
    before = await ada.service("GET", "nbos/api/kernels/plain-1?wait=ready")
    left = await asyncio.to_thread(cluster.stop, signal.SIGINT)
    assert not left
    await asyncio.to_thread(cluster.start)
    after = await ada.service("GET", "nbos/api/kernels/plain-1?wait=ready")
    assert after["connection"] == before["connection"]
    assert any(member["state"] == "ready" for member in after["members"])
    await ada.service("DELETE", "nbos/api/kernels/plain-1")


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_a_killed_up_leaves_no_process_either(cluster: Cluster, which: str) -> None:
    assert cluster.process
    outer = psutil.Process(cluster.process.pid)
    family = outer.children(recursive=True)
    inner = outer.children()[0]
    (outer if which == "outer" else inner).kill()
    cluster.process.wait(30)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    cluster.start()


class Browser:
    """Just enough of one: cookies, and redirects on the same host."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.cookies: dict[str, str] = {}

    async def get(self, path: str) -> str:
        return await self._follow(path, "GET", None)

    async def post(self, path: str, form: dict[str, str], status: int = 200) -> str:
        return await self._follow(path, "POST", urllib.parse.urlencode(form), status)

    async def _follow(self, path: str, method: str, body: str | None, status: int = 200) -> str:
        for _ in range(12):
            reply = await self._fetch(path, method, body)
            if reply.code not in (301, 302, 303):
                assert reply.code == status, f"{method} {path}: {reply.code}"
                return reply.body.decode()
            path, method, body = reply.headers["Location"].removeprefix(self.origin), "GET", None
            if path.startswith("/hub/spawn"):
                return ""
        raise AssertionError(f"too many redirects, last to {path}")

    async def _fetch(self, path: str, method: str, body: str | None) -> HTTPResponse:
        headers = {"Cookie": "; ".join(f"{k}={v}" for k, v in self.cookies.items()), "Sec-Fetch-Mode": "navigate"}
        request = HTTPRequest(
            self.origin + path, method=method, body=body, headers=headers, follow_redirects=False, request_timeout=30
        )
        reply = await AsyncHTTPClient().fetch(request, raise_error=False)
        for line in reply.headers.get_list("Set-Cookie"):
            name, _, value = line.partition(";")[0].partition("=")
            self.cookies[name] = value
        return reply
