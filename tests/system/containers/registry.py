"""A registry of a test's own with one image, which hands its layer out in two halves: the second when it is told to."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.system.containers.engine import docker

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


class Registry:
    """`image`: its name, with this registry's address. Docker trusts registries on loopback without TLS."""

    def __init__(self, size: int) -> None:
        self.go_on = threading.Event()
        layer = _tar("filling", os.urandom(size))  # new bytes: the Engine must not know it already
        config = json.dumps(
            {
                "architecture": docker("version", "--format", "{{.Server.Arch}}"),
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
            }
        ).encode()
        self.blobs = {_digest(blob): blob for blob in (layer, config)}
        kind = "application/vnd.docker."
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": _part(f"{kind}container.image.v1+json", config),
                "layers": [_part(f"{kind}image.rootfs.diff.tar.gzip", layer)],
            }
        ).encode()
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(False)

            def do_GET(self) -> None:
                self._answer(True)

            def _answer(self, body: bool) -> None:
                kind, data = "application/octet-stream", registry.blobs.get(self.path.rpartition("/")[2], b"")
                if "/manifests/" in self.path:
                    kind, data = MANIFEST, registry.manifest
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Docker-Content-Digest", _digest(data))
                self.end_headers()
                if body:
                    half = len(data) // 2
                    self.wfile.write(data[:half])
                    if len(data) > 1 << 20:
                        registry.go_on.wait(60)
                    self.wfile.write(data[half:])

            def log_message(self, format: str, *args: object) -> None:
                """Tests are quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.image = f"127.0.0.1:{self._server.server_port}/lab/filling:1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        docker("image", "rm", "--force", self.image, check=False)


def _tar(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _part(kind: str, data: bytes) -> dict[str, object]:
    return {"mediaType": kind, "size": len(data), "digest": _digest(data)}
