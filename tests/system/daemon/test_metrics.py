"""The metrics of a real daemon: who may ask for them, and that what cells do is what they say."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import ssl
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import checks

from nbos_cluster import certs
from nbos_cluster.etcd import Etcd
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Host, create, kernel_spec
from tests.system.etcdserver import EtcdServer, eventually
from tests.unit.daemon.test_metrics import documented

TOKEN = "a-token-of-the-test-that-is-long-enough"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    write(path, TOKEN + "\n")
    return path


def write(path: Path, text: str, mode: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(mode)


async def port_of(host: Host) -> int:
    found: list[str] = []

    async def listens() -> bool:
        found[:] = re.findall(r"metrics at https?://127\.0\.0\.1:(\d+)/metrics", host.log.read_text())
        return bool(found)

    await eventually(listens, "the daemon listens for Prometheus", 10)
    return int(found[-1])


def fetch(url: str, token: str = TOKEN, tls: ssl.SSLContext | None = None) -> str:
    request = Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urlopen(request, timeout=10, context=tls) as answer:
        return str(answer.read().decode())


def refused(url: str, token: str = "", tls: ssl.SSLContext | None = None) -> tuple[int, str]:
    with pytest.raises(HTTPError) as caught:
        fetch(url, token, tls)
    return caught.value.code, caught.value.read().decode()


def values(text: str) -> dict[tuple[str, ...], float]:
    """By the name of the series and the values of its labels, but for the device's name."""
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "device")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_what_cells_do_is_told_to_who_has_the_token(client: Etcd, host: MakeHost, token: Path) -> None:
    a = host("a", Metrics={"listen": "127.0.0.1:0", "token_file": str(token)})
    for kernel in ("k", "other"):
        await create(client, kernel_spec(kernel, "a", owner=f"user-{kernel}"))
    first, second = a.replica("k", 0), a.replica("other", 0)
    await first.ready()
    await second.ready()
    url = f"http://127.0.0.1:{await port_of(a)}/metrics"
    lead = await first.bid(1, gpus=2)
    waiting = asyncio.create_task(second.bid(1, tpcs=4, wait=True))

    async def waits() -> bool:
        return values(await asyncio.to_thread(fetch, url))["nbos_waiting_cells", "busy"] == 1

    await eventually(waits, "a cell waits", 5)
    text = await asyncio.to_thread(fetch, url)
    now = values(text)
    assert now["nbos_device_tpcs_granted", "0", "Simulated GPU"] == 8
    assert now["nbos_device_memory_granted_bytes", "1", "Simulated GPU"] == 8 << 30
    assert now["nbos_grants_total", "device"] == 1
    assert ("nbos_grants_total", "slice") not in now
    assert now["nbos_replicas", "ready"] == 2
    assert "user-" not in text, "no user's name without being asked for"
    await first.send("release", n=1)
    assert (await waiting)["waited"] > 0
    assert (await first.append(1, lead["token"]))["ok"]
    assert (await first.send("nonsense"))["error"] == "unknown"
    blob = b"x" * 1000
    assert (await first.send("put_blob", blob, hash="0" * 64))["ok"] is False
    now = values(await asyncio.to_thread(fetch, url))
    assert now["nbos_grants_total", "slice"] == now["nbos_gpu_wait_seconds_count", "slice"] == 1
    assert now["nbos_gpu_held_seconds_count", "device"] == 1
    assert now["nbos_gpu_held_seconds_sum", "device"] >= now["nbos_gpu_wait_seconds_sum", "slice"] > 0
    assert now["nbos_bids_total", "lead"] == now["nbos_bid_seconds_count",] == 2
    assert now["nbos_bid_seconds_sum",] < now["nbos_gpu_wait_seconds_sum", "slice"] + 1
    assert now["nbos_append_seconds_count",] == 1
    assert now["nbos_refusals_total", "unknown"] == 1
    assert now["nbos_blob_failures_total", "put"] == 1
    assert now["nbos_waiting_cells", "busy"] == 0
    assert now["nbos_device_tpcs_granted", "0", "Simulated GPU"] == 4
    assert now["nbos_etcd_up",] == 1
    assert now["nbos_etcd_transaction_seconds_count",] > 4


async def test_a_replica_that_dies_and_an_etcd_that_is_away_are_counted(
    client: Etcd, host: MakeHost, token: Path, etcd: EtcdServer
) -> None:
    a = host("a", Metrics={"listen": "127.0.0.1:0", "token_file": str(token), "owners": True})
    await create(client, kernel_spec("k", "a", owner="ann"))
    replica = a.replica("k", 0)
    pid = (await replica.ready())["pid"]
    url = f"http://127.0.0.1:{await port_of(a)}/metrics"
    await replica.bid(1, gpus=1)
    assert values(await asyncio.to_thread(fetch, url))["nbos_grants_total", "device", "ann"] == 1
    await asyncio.to_thread(os.kill, pid, signal.SIGKILL)

    async def again() -> bool:
        now = values(await asyncio.to_thread(fetch, url))
        return now["nbos_replica_restarts_total",] == now["nbos_abandoned_total",] == 1

    await eventually(again, "it is started again, its execution abandoned", 10)
    now = values(await asyncio.to_thread(fetch, url))
    assert (now["nbos_replica_starts_total",], now["nbos_replica_ends_total", "itself"]) == (2, 1)
    assert now["nbos_gpu_held_seconds_count", "device", "ann"] == 1
    await replica.ready(1)
    with etcd.paused():
        bid = asyncio.create_task(replica.bid(2, wait=True))

        async def away() -> bool:
            return values(await asyncio.to_thread(fetch, url))["nbos_etcd_up",] == 0

        await eventually(away, "etcd is away", 15)
        seen = time.monotonic()
        await eventually(lambda: time.monotonic() > seen + 0.2, "that is counted from when it was noticed")
    assert (await bid)["answer"] == "lead"
    now = values(await asyncio.to_thread(fetch, url))
    assert now["nbos_etcd_up",] == 1
    assert now["nbos_etcd_failures_total",] >= 1
    assert now["nbos_etcd_away_seconds_total",] > 0.1


async def test_who_has_no_token_learns_nothing(client: Etcd, host: MakeHost, token: Path) -> None:
    a = host("a", Metrics={"listen": "127.0.0.1:0", "token_file": str(token)})
    base = f"http://127.0.0.1:{await port_of(a)}"
    for path in ("/metrics", "/", "/anything"):
        for wrong in ("", "wrong", TOKEN[:-1], f"{TOKEN}x"):
            assert refused(base + path, wrong) == (401, "401\n")
    assert refused(f"{base}/anything", TOKEN)[0] == 404
    write(token, "another-token-that-is-long-enough")
    assert refused(f"{base}/metrics", TOKEN)[0] == 401
    assert "nbos_etcd_up" in fetch(f"{base}/metrics", "another-token-that-is-long-enough")
    write(token, "another-token-that-is-long-enough", 0o644)
    assert refused(f"{base}/metrics", "another-token-that-is-long-enough")[0] == 401


PATHS = ("/metrics", "/{anything}")
METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
ANSWERS = {code: {"description": code} for code in ("200", "400", "401", "404", "405", "413", "431")}
ANY = {
    "parameters": [
        {"name": "q", "in": "query", "schema": {}},
        {"name": "Accept", "in": "header", "schema": {"type": "string"}},
        {"name": "Accept-Encoding", "in": "header", "schema": {"type": "string"}},
        {"name": "Authorization", "in": "header", "schema": {"enum": ["", f"Bearer {TOKEN}", "Bearer x", "Basic x"]}},
    ],
    "responses": ANSWERS,
}
BODY = {"requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}}
ANYTHING = {"parameters": [{"name": "anything", "in": "path", "required": True, "schema": {"type": "string"}}]}


async def test_no_request_breaks_the_endpoint(client: Etcd, host: MakeHost, token: Path) -> None:
    """Every method and path, with whatever query, headers and body: an answer within seconds, never a 5xx."""
    a = host("a", Metrics={"listen": "127.0.0.1:0", "token_file": str(token)})
    operations = {m: ANY | (BODY if m in ("put", "post", "patch") else {}) for m in METHODS}
    paths = {path: operations | (ANYTHING if "{" in path else {}) for path in PATHS}
    schema = schemathesis.openapi.from_dict(
        {"openapi": "3.0.3", "info": {"title": "metrics", "version": "1"}, "paths": paths}
    )
    schema.config.update(base_url=f"http://127.0.0.1:{await port_of(a)}")

    def attempts(operation: Any) -> None:
        @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy())
        def attempt(case: schemathesis.Case) -> None:
            response = case.call(timeout=5)
            case.validate_response(response, checks=[checks.not_a_server_error, checks.status_code_conformance])
            if (case.headers or {}).get("Authorization") != f"Bearer {TOKEN}":
                assert "nbos_" not in response.text

        attempt()

    for path in PATHS:
        for method in METHODS:
            await asyncio.to_thread(attempts, schema[path][method])
    assert "nbos_etcd_up" in fetch(f"http://127.0.0.1:{await port_of(a)}/metrics")


async def test_with_certificates_only_those_that_are_named_may_ask(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    book = tmp_path / "certs"
    ca = certs.make_ca(book)
    cert, key = certs.issue(book, "metrics", ["127.0.0.1"], client=False, server=True)
    a = host("a", Metrics={"listen": "127.0.0.1:0", "cert": str(cert), "key": str(key), "client_ca": str(ca)})
    url = f"https://127.0.0.1:{await port_of(a)}/metrics"

    def context(*mine: Path) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=ca)
        if mine:
            made.load_cert_chain(*mine)
        return made

    assert "nbos_etcd_up" in fetch(url, "", context(*certs.issue(book, "reader")))
    assert refused(url, "", context(*certs.issue(book, "gateway"))) == (403, "403\n")
    foreign = tmp_path / "foreign"
    certs.make_ca(foreign)
    for strangers in ([], certs.issue(foreign, "reader")):
        with pytest.raises(OSError, match=r"(?i)ssl|certificate|reset|closed|broken"):
            fetch(url, "", context(*strangers))
    assert "nbos_etcd_up" in fetch(url, "", context(*certs.issue(book, "reader"))), "and it goes on"


async def test_all_that_is_exported_is_documented(client: Etcd, host: MakeHost, token: Path) -> None:
    a = host("a", Metrics={"listen": "127.0.0.1:0", "token_file": str(token)})
    text = fetch(f"http://127.0.0.1:{await port_of(a)}/metrics")
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE nbos_")}
    assert names == set(documented("gpu_daemon"))


def test_a_daemon_that_anybody_could_ask_does_not_start(host: MakeHost, token: Path) -> None:
    def start(name: str, **metrics: Any) -> str:
        a = host(name, Metrics=metrics)
        assert a.process is not None
        assert a.process.wait(20) == 2
        return a.log.read_text()

    assert "would let anybody ask; set Metrics.token_file" in start("a", listen="127.0.0.1:0")
    assert "travel in clear" in start("b", listen="0.0.0.0:0", token_file=str(token))


async def test_without_configuration_nothing_listens(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    assert a.process is not None
    await create(client, kernel_spec("k", "a"))
    await a.replica("k", 0).ready()
    assert not [c for c in psutil.Process(a.process.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
