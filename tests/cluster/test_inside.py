"""From inside a user's Jupyter Server, where a terminal is one click away: what else of the cluster its user gets at
(nothing). From inside a replica the same is tried in tests/system/containers, and across machines in test_faults.
"""

from __future__ import annotations

import json

import pytest

from tests.cluster.machines import Machines
from tests.system.containers.engine import docker

pytestmark = pytest.mark.timeout(120)

ASK = """
import json, os, ssl, sys, urllib.error, urllib.request
def ask(url, method="GET", body=None, token=os.environ["JUPYTERHUB_API_TOKEN"]):
    'The status, and what was said; an error that is none of HTTP by its name.'
    headers = {"Authorization": "token " + token} if token else {}
    request = urllib.request.Request(url, method=method, headers=headers, data=body)
    anybody = ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(request, timeout=10, context=anybody) as answer:
            return answer.status, answer.read(2000).decode(errors="replace")
    except urllib.error.HTTPError as err:
        return err.code, ""
    except OSError as err:
        return type(err).__name__, str(err)
print(json.dumps(eval(sys.argv[1])))
"""


async def tried(machines: Machines, expression: str) -> object:
    """The value of an expression in the server of ada."""
    await machines.hub.start_server("ada")
    return json.loads(machines.engine("hub", "exec", "jupyter-ada", "python3", "-c", ASK, expression))


async def status(machines: Machines, url: str, more: str = "") -> object:
    found = await tried(machines, f"ask({url!r}{more})")
    assert isinstance(found, list)
    return found[0]


async def test_its_own_token_is_good_for_what_it_is_for(machines: Machines) -> None:
    """Else every refusal below would say nothing."""
    hub = f"http://{machines.network}.10:8081/hub/api"
    assert await status(machines, f"{hub}/user") == 200
    assert await status(machines, f"http://{machines.network}.10:8765/services/nbos/api/kernels") == 200


async def test_docker_is_not_there(machines: Machines) -> None:
    places = "('/var/run/docker.sock', '/run/docker.sock', '/run/containerd/containerd.sock')"
    assert await tried(machines, f"[p for p in {places} if os.path.exists(p)]") == []
    for port in (2375, 2376):
        assert await status(machines, f"http://{machines.network}.10:{port}/version") == "URLError"


async def test_etcd_says_nothing_without_a_certificate(machines: Machines) -> None:
    for port in (2379, 2380):
        for path in ("version", "health", "members", "metrics"):
            kind, said = await tried(machines, f"ask('https://{machines.network}.21:{port}/{path}')")  # type: ignore[misc]
            assert not isinstance(kind, int), said


async def test_no_file_of_another_user_or_of_a_machine_is_there(machines: Machines) -> None:
    await machines.hub.start_server("bob")
    machines.inside("hub", "touch", "/shared/home/bob/private")
    assert await tried(machines, "os.listdir('/home')") == ["jovyan"]
    assert await tried(machines, "os.path.exists('/home/jovyan/private')") is False
    places = "('/shared', '/etc/nbos-tls', '/etc/nbos-secrets', '/certs', '/srv/jupyterhub', '/var/lib/nbos')"
    assert await tried(machines, f"[p for p in {places} if os.path.exists(p)]") == []


ADDRESS = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"


def proxy(machines: Machines) -> str:
    return docker("inspect", "--format", ADDRESS, machines.container("proxy"))


async def test_another_users_server_refuses(machines: Machines) -> None:
    await machines.hub.start_server("bob")
    direct = machines.engine("hub", "inspect", "--format", ADDRESS, "jupyter-bob")
    for server in (f"http://{proxy(machines)}:8000", f"http://{direct}:8888"):
        assert await status(machines, f"{server}/user/bob/api") == 200, "it is there"
        for path in ("kernels", "contents", "terminals", "sessions"):
            assert await status(machines, f"{server}/user/bob/api/{path}") == 403


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("users", "GET"),
        ("users/bob", "GET"),
        ("users/bob/server", "POST"),
        ("users/bob/tokens", "POST"),
        ("users/ada/tokens", "POST"),
        ("users/eve", "POST"),
        ("groups", "GET"),
        ("services", "GET"),
        ("proxy", "GET"),
        ("shutdown", "POST"),
    ],
)
async def test_the_hub_refuses_what_is_beyond_its_token(machines: Machines, path: str, method: str) -> None:
    body = ", body=b'{}'" if method == "POST" else ""
    hub = f"http://{machines.network}.10:8081/hub/api/{path}"
    assert await status(machines, hub, f", method={method!r}{body}") in (403, 404)


async def test_the_proxys_own_interface_refuses(machines: Machines) -> None:
    for token in ("", "guess"):
        assert await status(machines, f"http://{proxy(machines)}:8001/api/routes", f", token={token!r}") == 403


async def test_no_host_listens_for_it(machines: Machines) -> None:
    """A daemon has no network side at all; what listens on a host are replicas, which want their kernel's keys."""
    for port in (22, 80, 443, 2375, 8000, 8765, 9100):
        assert await status(machines, f"http://{machines.network}.11:{port}/", ", token=''") == "URLError"
