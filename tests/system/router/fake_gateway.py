"""A gateway of one user, as docs/protocol.md §3 says, whose replicas are doubles. It counts what it is asked."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import zmq
from tornado import httpserver, netutil, web

from tests.system.ports import free_ports

from .rig import start_double

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
TOKEN = "the-token"


class FakeGateway:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.kernels: dict[str, dict[str, Any]] = {}
        self.requests: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.calls: Counter[str] = Counter()
        self.ready = True
        (socket,) = netutil.bind_sockets(0, "127.0.0.1")
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}/services/nbos/"
        routes = [(r"/services/nbos/api/kernels(?:/([^/]+)(/restart)?)?", Kernels, {"gateway": self})]
        self.server = httpserver.HTTPServer(web.Application(routes))
        self.server.add_sockets([socket])

    def create(self, kernel_id: str, request: dict[str, Any]) -> dict[str, Any]:
        if kernel_id not in self.kernels:
            public, secret = zmq.curve_keypair()
            connection = {
                "key": secrets.token_hex(16),
                "signature_scheme": "hmac-sha256",
                "curve_publickey": public.decode(),
                "curve_secretkey": secret.decode(),
            }
            owner = {"owner": "ada", "server": request.get("server", "")}
            self.kernels[kernel_id] = {"kernel_id": kernel_id, **owner, "epoch": 0, "connection": connection}
            self.requests[kernel_id] = request
            self.start(kernel_id)
        return self.kernels[kernel_id]

    def start(self, kernel_id: str) -> None:
        """A (new) process for the kernel's only replica."""
        model = self.kernels[kernel_id]
        model["epoch"] += 1
        root = self.root / f"{kernel_id}-{model['epoch']}"
        for name in ("claims", "log"):
            (root / name).mkdir(parents=True)
        ports = dict(zip(CHANNELS, free_ports(5), strict=True))
        process = self.processes[kernel_id] = start_double(root, 0, ports, model["connection"])
        where = {"ip": "127.0.0.1", "ports": ports, "pid": process.pid}
        model["members"] = [{"index": 0, "host": "host-0", "state": "ready", "applied": 0, **where}]

    def end(self, kernel_id: str) -> None:
        process = self.processes.pop(kernel_id)
        process.kill()
        process.wait()

    def close(self) -> None:
        self.server.stop()
        for kernel_id in list(self.processes):
            self.end(kernel_id)


class Kernels(web.RequestHandler):
    def initialize(self, gateway: FakeGateway) -> None:
        self.gateway = gateway

    def prepare(self) -> None:
        if self.request.headers.get("Authorization") != f"token {TOKEN}":
            self.set_status(403)
            self.finish({"error": "forbidden", "message": "this token is not known"})

    def get(self, kernel_id: str | None, _: str | None) -> None:
        self.gateway.calls["get" if kernel_id else "list"] += 1
        if kernel_id is None:
            self.finish(json.dumps(list(self.gateway.kernels.values())))
        elif kernel_id in self.gateway.kernels:
            model = self.gateway.kernels[kernel_id]
            self.finish(model if self.gateway.ready else {**model, "members": []})
        else:
            self.set_status(404)
            self.finish({"error": "not_found", "message": "no such kernel"})

    def post(self, kernel_id: str | None, restart: str | None) -> None:
        self.gateway.calls["restart" if restart else "create"] += 1
        if restart and kernel_id:
            self.gateway.end(kernel_id)
            self.gateway.start(kernel_id)
            self.finish(self.gateway.kernels[kernel_id])
        else:
            request = json.loads(self.request.body)
            model = self.gateway.create(request.pop("kernel_id"), request)
            self.finish(model if self.gateway.ready else {**model, "members": []})

    def delete(self, kernel_id: str, _: str | None) -> None:
        self.gateway.calls["delete"] += 1
        self.gateway.end(kernel_id)
        del self.gateway.kernels[kernel_id]
        self.set_status(204)
