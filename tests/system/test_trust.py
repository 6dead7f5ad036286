"""One `nbos up` looked at by those who should get nothing: at its ports, and with tokens that may do less.

What each token may do at the hub and at the gateway is a table; the gateway's API is tried with all kinds of requests
that its own description allows and forbids (schemathesis).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
import schemathesis
import zmq
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode, checks
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd, EtcdError, TLSFiles
from nbos_cluster.records import ExpectedRecord
from nbos_spawner import gateway
from tests.system.cluster import Cluster, Notebook
from tests.system.hubclient import Hub, HubError, eventually
from tests.system.nbosenv import etcd_of
from tests.system.zmtp import SOCKETS, mechanism, stranger_gets
from tests.unit.daemon.test_metrics import documented

KERNELS = "custom:nbos:kernels!user"
ACCESS = "access:services!service=nbos"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="nbos-trust-") as folder:
        limits = Path(folder) / "limits.json"
        limits.write_text(json.dumps({"users": {"fuzz": {"kernels": 1, "replicas": 1}}}))
        one = Cluster(Path(folder) / "state", "--gpus", "1", "--limits", str(limits))
        one.start()
        try:
            yield one
        finally:
            assert not one.stop(), "processes were left"


@pytest.fixture
async def notebook(cluster: Cluster) -> AsyncIterator[Notebook]:
    notebook = await Notebook.open(cluster, "ada", {"replicas": 2})
    await notebook.settled()
    yield notebook
    await notebook.close()


def ports_of(process: psutil.Process) -> dict[int, str]:
    """Where it listens: address by port."""
    return {c.laddr.port: c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


# A child's output has its own way, which the cell's end does not wait for.
FORK = """
import os, sys, time
pid = os.fork()
if not pid:
    print("child"); sys.stdout.flush(); os._exit(0)
done = os.waitpid(pid, 0); time.sleep(0.5)
"""


# -- ports --------------------------------------------------------------------------------------------------------


async def test_no_port_of_a_kernel_answers_without_its_keys(cluster: Cluster, notebook: Notebook) -> None:
    members = (await notebook.model())["members"]
    assert await notebook.run("40 + 2") == "42"
    for member in members:
        listening = ports_of(psutil.Process(member["pid"]))
        assert set(member["ports"].values()) <= set(listening)
        for port in set(listening) - set(member["ports"].values()):  # where forked children bring their output
            assert mechanism(port) == "CURVE"
            assert await asyncio.to_thread(stranger_gets, zmq.PUSH, port) == "refused"
        for channel, port in member["ports"].items():
            assert mechanism(port) == "CURVE", channel
            for keyed in (False, True):
                got = await asyncio.to_thread(stranger_gets, SOCKETS[channel], port, keys=keyed)
                assert got == "refused", (channel, keyed)
    router = cluster.one("nbos_provisioner.router")
    listening = ports_of(router)
    assert len(listening) == 5
    for port in listening:
        assert mechanism(port) == "CURVE"
        for kind in set(SOCKETS.values()):
            assert await asyncio.to_thread(stranger_gets, kind, port) == "refused"
            assert await asyncio.to_thread(stranger_gets, kind, port, keys=True) == "refused"
    assert await notebook.run(FORK) == "child\n"


async def test_nothing_listens_on_other_interfaces(cluster: Cluster, notebook: Notebook) -> None:
    found = {
        (" ".join(process.cmdline())[:80], ip)
        for process in cluster.processes(lambda line: True)
        for ip in ports_of(process).values()
    }
    assert len(found) > 6
    assert {ip for _, ip in found} == {"127.0.0.1"}, found


async def test_a_daemon_listens_on_no_port_at_all(cluster: Cluster) -> None:
    daemons = cluster.processes(lambda line: "gpu_daemon" in line and "nbos_kernel" not in line)
    assert len(daemons) >= 3
    assert [ports_of(daemon) for daemon in daemons] == [{}] * len(daemons)


async def test_etcd_knows_each_process_by_its_certificate(cluster: Cluster) -> None:
    tls = cluster.state_dir / "tls"
    endpoints = cluster.status()["etcd"]["endpoints"]

    def client(name: str) -> Etcd:
        return Etcd(endpoints, TLSFiles(tls / "ca.pem", tls / f"{name}.pem", tls / f"{name}.key"))

    async with client("host-1") as daemon, client("gateway") as service, client("up") as root:
        for etcd, key in ((daemon, keys.host("host-2")), (service, keys.host("host-1")), (daemon, "/elsewhere")):
            with pytest.raises(EtcdError, match="permission denied"):
                await etcd.put(key, b"x")
        assert await root.get(keys.host("host-2")) is not None


# -- tokens -------------------------------------------------------------------------------------------------------


async def status_of(asking: Any) -> int:
    """200 for what is answered, else the refusal's status."""
    try:
        await asking
    except HubError as err:
        return err.status
    return 200


SERVER_MAY_NOT = {
    "list users": ("GET", "users", None),
    "see another user": ("GET", "users/eve", None),
    "make a user": ("POST", "users/mallory", None),
    "delete its user": ("DELETE", "users/ada", None),
    "make itself an administrator": ("PATCH", "users/ada", {"admin": True}),
    "make a token": ("POST", "users/ada/tokens", {}),
    "make another's token": ("POST", "users/eve/tokens", {}),
    "list tokens": ("GET", "users/ada/tokens", None),
    "start another's server": ("POST", "users/eve/server", {}),
    "stop its own server": ("DELETE", "users/ada/server", None),
    "report another's activity": ("POST", "users/eve/activity", {"last_activity": "2030-01-01T00:00:00Z"}),
    "list services": ("GET", "services", None),
    "list groups": ("GET", "groups", None),
    "see the proxy's routes": ("GET", "proxy", None),
    "shut the hub down": ("POST", "shutdown", {}),
}


async def server_token(cluster: Cluster, user: str) -> Hub:
    await cluster.hub.start_server(user, {"replicas": 1})
    return cluster.hub.as_user(cluster.user_server(user).environ()["JUPYTERHUB_API_TOKEN"])


async def test_a_servers_token_is_good_for_its_kernels_only(cluster: Cluster) -> None:
    await cluster.hub.add_user("eve")
    server = await server_token(cluster, "ada")
    went_through = {}
    for what, (method, path, body) in SERVER_MAY_NOT.items():
        status = await status_of(server.api(method, path, body))
        if status not in (403, 404):
            went_through[what] = status
    assert went_through == {}
    # What it is for.
    made = await server.service("POST", "nbos/api/kernels", {"kernel_id": "mine", "replicas": 1})
    assert made["connection"]["curve_secretkey"]
    await server.service("DELETE", "nbos/api/kernels/mine")
    me = await server.api("GET", "user")
    assert {scope for scope in me["scopes"] if "nbos" in scope} == {ACCESS, f"{KERNELS}=ada"}


async def test_a_token_that_may_only_look_gets_no_keys_and_changes_nothing(cluster: Cluster) -> None:
    await cluster.hub.add_user("ada")
    full = cluster.hub.as_user(await cluster.hub.user_token("ada"))
    look = cluster.hub.as_user(await cluster.hub.user_token("ada", [ACCESS]))
    await full.service("POST", "nbos/api/kernels", {"kernel_id": "seen", "replicas": 1})
    try:
        assert "connection" not in await look.service("GET", "nbos/api/kernels/seen")
        assert all("connection" not in model for model in await look.service("GET", "nbos/api/kernels"))
        for method, path in (("POST", ""), ("POST", "/seen/restart"), ("DELETE", "/seen")):
            body = {"kernel_id": "more"}
            assert await status_of(look.service(method, f"nbos/api/kernels{path}", body)) == 403
        only_kernels = cluster.hub.as_user(await cluster.hub.user_token("ada", [KERNELS]))
        assert await status_of(only_kernels.service("GET", "nbos/api/kernels")) == 403
        assert "connection" in await full.service("GET", "nbos/api/kernels/seen")
    finally:
        await full.service("DELETE", "nbos/api/kernels/seen")


async def test_one_says_of_oneself_only_that_one_is_expected_and_of_allowed_images_only(cluster: Cluster) -> None:
    await cluster.hub.add_user("zoe")
    full = cluster.hub.as_user(await cluster.hub.user_token("zoe"))
    look = cluster.hub.as_user(await cluster.hub.user_token("zoe", [ACCESS]))
    assert await status_of(look.service("POST", "nbos/api/expected", {"image": ""})) == 403
    assert await status_of(full.service("POST", "nbos/api/expected", {"image": "lab/secret"})) == 403
    assert await status_of(full.service("POST", "nbos/api/expected", {"owner": "eve"})) == 400
    assert await status_of(cluster.hub.service("POST", "nbos/api/expected", {"image": ""})) == 403
    endpoints, tls = etcd_of(cluster.state_dir)
    async with Etcd(endpoints, tls) as etcd:
        await full.service("POST", "nbos/api/expected", {"image": ""})
        found = await etcd.get(keys.expected("zoe"))
        assert found is not None
        assert records.decode(found.value, ExpectedRecord) == ExpectedRecord(owner="zoe")
        assert 0 < await etcd.lease_alive(found.lease) <= 600


async def dashboard(cluster: Cluster, token: str) -> str:
    request = HTTPRequest(
        f"http://127.0.0.1:{cluster.port}/services/nbos/", headers={"Authorization": f"token {token}"}
    )
    return (await AsyncHTTPClient().fetch(request)).body.decode()


async def test_an_administrators_notebook_is_no_administrator(cluster: Cluster) -> None:
    """What runs in it could otherwise see and end everybody's kernels."""
    await cluster.hub.add_user("eve")
    eve = cluster.hub.as_user(await cluster.hub.user_token("eve"))
    await eve.service("POST", "nbos/api/kernels", {"kernel_id": "eves", "replicas": 1})
    try:
        theirs = await server_token(cluster, "admin")
        assert await theirs.service("GET", "nbos/api/kernels") == []
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/restart")):
            assert await status_of(theirs.service(method, f"nbos/api/kernels/eves{path}", {})) == 404
        page = await dashboard(cluster, theirs.token)
        assert "host-1" in page
        assert "eves" not in page
        themselves = cluster.hub.as_user(await cluster.hub.user_token("admin"))
        assert (await themselves.service("GET", "nbos/api/kernels/eves"))["owner"] == "eve"
    finally:
        await eve.service("DELETE", "nbos/api/kernels/eves")
        await cluster.hub.stop_server("admin")


async def test_a_token_that_ended_or_was_revoked_stops_working(cluster: Cluster) -> None:
    """An old one within seconds; a new one, as a server gets at each start, works at once."""
    await cluster.hub.add_user("ada")
    made = await cluster.hub.api("POST", "users/ada/tokens", {"expires_in": 2})
    revoked = await cluster.hub.api("POST", "users/ada/tokens", {"expires_in": 600})
    tokens = [cluster.hub.as_user(token["token"]) for token in (made, revoked)]
    for token in tokens:
        assert isinstance(await token.service("GET", "nbos/api/kernels"), list)
    await cluster.hub.api("DELETE", f"users/ada/tokens/{revoked['id']}")

    async def both_refused() -> bool:
        return [await status_of(token.service("GET", "nbos/api/kernels")) for token in tokens] == [403, 403]

    await eventually(both_refused, "both tokens are refused", 30, every=0.5)
    fresh = cluster.hub.as_user(await cluster.hub.user_token("ada"))
    assert isinstance(await fresh.service("GET", "nbos/api/kernels"), list)


async def test_a_server_started_again_has_a_new_token_and_its_kernels(cluster: Cluster) -> None:
    first = await server_token(cluster, "ada")
    kernel = await (await cluster.hub.start_server("ada")).start_kernel("nbos-python3")
    await cluster.hub.stop_server("ada")
    second = await server_token(cluster, "ada")
    assert second.token != first.token
    server = await cluster.hub.start_server("ada")
    assert [found["id"] for found in await server.kernels()] == [kernel]
    assert await status_of(second.service("GET", f"nbos/api/kernels/{kernel}")) == 200

    async def refused() -> bool:
        return await status_of(first.service("GET", "nbos/api/kernels")) == 403

    await eventually(refused, "the token of before is refused", 30, every=0.5)
    await server.delete_kernel(kernel)


# -- metrics ---------------------------------------------------------------------------------------------------------


async def metrics_of(cluster: Cluster, token: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{cluster.port}/services/nbos/metrics"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    reply = await AsyncHTTPClient().fetch(HTTPRequest(url, headers=headers), raise_error=False)
    return reply.code, reply.body.decode()


def values_in(text: str) -> dict[tuple[str, ...], float]:
    """By name and labels' values, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_are_for_tokens_with_the_scope_that_guards_the_hubs_own(
    cluster: Cluster, notebook: Notebook
) -> None:
    hub = cluster.hub
    await hub.add_user("eve")
    await hub.api("PATCH", "users/eve", {"admin": True})
    few = await hub.user_token("eve", ["read:metrics", ACCESS])
    assert [(await metrics_of(cluster, token))[0] for token in ("", "nonsense")] == [401, 403]
    for token in (await hub.user_token("ada"), await hub.user_token("eve", ["read:metrics"])):
        assert (await metrics_of(cluster, token))[0] == 403
    assert (await metrics_of(cluster, hub.token))[0] == 200

    model = await notebook.model()
    kernel = model["kernel_id"]

    async def complete() -> str | None:
        code, text = await metrics_of(cluster, few)
        assert code == 200
        return text if values_in(text)["nbos_gateway_replicas", "ready"] == model["replicas"] else None

    text = await eventually(complete, "all replicas of the kernel count as ready")
    assert '"ada"' not in text
    assert kernel not in text
    values = values_in(text)
    assert (values["nbos_gateway_ready",], values["nbos_gateway_hosts", "up"]) == (1, 3)
    assert values["nbos_gateway_requests_total", "metrics", "403", "GET"] >= 3
    assert values["nbos_gateway_requests_total", "kernels", "201", "POST"] >= 1
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE nbos_")}
    assert names == set(documented("gateway"))
    with pytest.raises(HubError):
        await hub.as_user(few).service("DELETE", f"nbos/api/kernels/{kernel}")


# -- the API, tried with everything ---------------------------------------------------------------------------------

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


MINE = "mine"
DESCRIPTION = json.loads((Path(gateway.__file__).parent / "openapi.json").read_text())


@pytest.fixture(scope="module")
def fuzz(cluster: Cluster) -> tuple[Any, str]:
    """The gateway's own description, and the token of the user `fuzz`, who may have one kernel of one replica."""

    async def prepare() -> tuple[dict[str, Any], str]:
        await cluster.hub.add_user("fuzz")
        reply = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{cluster.port}/services/nbos/api/openapi.json")
        return json.loads(reply.body), await cluster.hub.user_token("fuzz")

    description, token = asyncio.run(prepare())
    assert description == DESCRIPTION
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=f"http://127.0.0.1:{cluster.port}/services/nbos")
    return schema, token


@pytest.mark.parametrize(
    ("path", "method"), [(p, m) for p, o in DESCRIPTION["paths"].items() for m in o if m != "parameters"]
)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_breaks_the_gateway(fuzz: tuple[Any, str], path: str, method: str, mode: GenerationMode) -> None:
    schema, token = fuzz
    operation = schema[path][method]

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def attempt(case: schemathesis.Case) -> None:
        if (
            mode is GenerationMode.POSITIVE
            and "kernel_id" in case.path_parameters
            and len(case.path_parameters["kernel_id"]) % 2
        ):
            case.path_parameters["kernel_id"] = MINE  # often one that is there
        if isinstance(case.query.get("within", 25), int):
            case.query["within"] = 0  # a wait that finds nothing to tell is not what is tried here
        response = case.call(headers={"Authorization": f"token {token}"}, timeout=40)
        case.validate_response(response, checks=CHECKS)

    if "{kernel_id}" in path:
        schema["/api/kernels"]["post"].Case(body={"kernel_id": MINE}).call(headers={"Authorization": f"token {token}"})
    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing about it can be wrong
        attempt()
