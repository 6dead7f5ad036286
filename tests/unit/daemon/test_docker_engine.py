"""The daemon's line to an Engine that listens on TCP with TLS: whom it believes to be that Engine."""

from __future__ import annotations

import json
import shutil
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpu_daemon.docker_engine import Engine
from gpu_daemon.runtime import RuntimeFailed
from nbos_cluster import certs


class Answers(BaseHTTPRequestHandler):
    """As much of an Engine as says its version."""

    def do_GET(self) -> None:
        body = json.dumps({"Version": "20.10.99"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def docker_host(tmp_path: Path) -> Iterator[str]:
    """Address of an Engine whose certificate is signed by engine/ca.pem, and which wants one signed by that."""
    ca = certs.make_ca(tmp_path / "engine")
    own = certs.issue(tmp_path / "engine", "server", ["127.0.0.1"], client=False, server=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ca))
    context.load_cert_chain(*own)
    context.verify_mode = ssl.CERT_REQUIRED
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"tcp://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cert_path(tmp_path: Path, docker_host: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$DOCKER_CERT_PATH, as the daemon's administrator has set it."""
    folder = tmp_path / "docker"
    folder.mkdir()
    cert, key = certs.issue(tmp_path / "engine", "daemon")
    for source, name in ((tmp_path / "engine" / "ca.pem", "ca.pem"), (cert, "cert.pem"), (key, "key.pem")):
        shutil.copy(source, folder / name)
    for name, value in (("HOST", docker_host), ("TLS_VERIFY", "1"), ("CERT_PATH", str(folder))):
        monkeypatch.setenv(f"DOCKER_{name}", value)
    return folder


async def test_the_engines_own_ca_counts_whatever_bundle_the_environment_names(
    cert_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certs.make_ca(tmp_path / "company")))
    engine = Engine()
    await engine.connect(0)
    assert engine.version == "20.10.99"
    engine.close()


async def test_an_engine_of_another_ca_is_refused_though_the_environments_bundle_knows_it(
    cert_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "engine" / "ca.pem"))
    shutil.copy(certs.make_ca(tmp_path / "other"), cert_path / "ca.pem")
    engine = Engine()
    with pytest.raises(RuntimeFailed, match="CERTIFICATE_VERIFY_FAILED"):
        await engine.connect(-1)
    engine.close()
