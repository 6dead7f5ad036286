"""A router process with replica doubles behind it, and a stock jupyter_client in front."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq
from jupyter_client import BlockingKernelClient

from tests.system.ports import free_ports

REPOSITORY = Path(__file__).parents[3]
CHANNELS = ("shell", "iopub", "stdin", "control", "hb")


def wait_for(condition: Callable[[], Any], seconds: float = 20.0, what: str = "") -> Any:
    """The first true value of `condition`, polled until a deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {what or condition}")


def start_double(root: Path, index: int, ports: dict[str, int], keys: dict[str, str]) -> subprocess.Popen[bytes]:
    """A replica double's process, its election in `root`."""
    file = root / f"connection-{index}.json"
    info = {f"{name}_port": port for name, port in ports.items()}
    common = {"transport": "tcp", "signature_scheme": "hmac-sha256", "ip": "127.0.0.1"}
    file.write_text(json.dumps({**info, **common, **keys}))
    env = {**os.environ, "DOUBLE_ROOT": str(root), "DOUBLE_INDEX": str(index)}
    double = Path(__file__).with_name("replica_double.py")
    command = [sys.executable, "-Xfrozen_modules=off", str(double), str(file)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)


class Rig:
    def __init__(self, root: Path, replicas: int = 3, **config: Any) -> None:
        self.root = root
        for name in ("claims", "log"):
            (root / name).mkdir()
        self.key = secrets.token_hex(16)
        public, secret = zmq.curve_keypair()
        self.curve = {"curve_publickey": public.decode(), "curve_secretkey": secret.decode()}
        self.replicas: dict[int, subprocess.Popen[bytes]] = {}
        self.ports: dict[int, dict[str, int]] = {}
        self.epoch = 0
        self.started = time.monotonic()
        self.router = subprocess.Popen(
            [sys.executable, "-m", "nbos_provisioner.router"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            text=True,
        )
        self.send({"key": self.key, **self.curve, "ip": "127.0.0.1", **config})
        self.ready = self.event("ready")
        self.ready_after = time.monotonic() - self.started
        for index in range(replicas):
            self.start_replica(index)
        self.tell_members()

    def send(self, line: dict[str, Any]) -> None:
        assert self.router.stdin is not None
        self.router.stdin.write(json.dumps(line) + "\n")
        self.router.stdin.flush()

    def event(self, kind: str) -> dict[str, Any]:
        assert self.router.stdout is not None
        while line := self.router.stdout.readline():
            event = json.loads(line)
            if event["event"] == kind:
                return event
        raise AssertionError(f"the router ended before it said {kind}")

    def start_replica(self, index: int) -> None:
        ports = self.ports.setdefault(index, dict(zip(CHANNELS, free_ports(5), strict=True)))
        self.replicas[index] = start_double(self.root, index, ports, {"key": self.key, **self.curve})

    def member(self, index: int) -> dict[str, Any]:
        pid = self.replicas[index].pid
        where = {"ip": "127.0.0.1", "ports": self.ports[index]}
        return {"index": index, "host": f"host-{index}", "state": "ready", "pid": pid, "applied": 0, **where}

    def tell_members(self, **changed: Any) -> None:
        self.epoch += 1
        members = [{**self.member(index), **changed} for index in self.replicas]
        self.send({"command": "members", "epoch": self.epoch, "members": members})

    def kill(self, index: int, signum: int = signal.SIGKILL) -> None:
        self.replicas[index].send_signal(signum)
        if signum == signal.SIGKILL:
            self.replicas[index].wait()

    def executor(self, n: int) -> int:
        claim = self.root / "claims" / str(n)
        wait_for(lambda: claim.exists() and claim.read_text(), what=f"claim {n}")
        return int(json.loads(claim.read_text())["replica"])

    def connection_info(self) -> dict[str, Any]:
        ports = {f"{name}_port": port for name, port in self.ready["ports"].items()}
        common = {"transport": "tcp", "signature_scheme": "hmac-sha256", "key": self.key.encode()}
        return {**ports, **common, "ip": "127.0.0.1", **self.curve}

    def client(self) -> BlockingKernelClient:
        client = BlockingKernelClient()
        client.load_connection_info(self.connection_info())
        client.start_channels()
        return client

    def close(self) -> None:
        assert self.router.stdin is not None
        self.router.stdin.close()
        self.router.wait(10)
        for process in self.replicas.values():
            process.kill()
            process.wait()


@contextlib.contextmanager
def rig(root: Path, replicas: int = 3, **config: Any) -> Iterator[tuple[Rig, BlockingKernelClient]]:
    it = Rig(root, replicas, **config)
    client = it.client()
    try:
        client.wait_for_ready(timeout=60)
        yield it, client
    finally:
        client.stop_channels()
        it.close()


class Seen:
    """What a client got for one execute_request: outputs by type, the reply, and the statuses."""

    def __init__(self, client: BlockingKernelClient, msg_id: str) -> None:
        self.client, self.msg_id = client, msg_id
        self.messages: list[dict[str, Any]] = []
        self.reply: dict[str, Any] = {}

    def until(self, condition: Callable[[Seen], bool], seconds: float = 30.0) -> Seen:
        deadline = time.monotonic() + seconds
        while not condition(self):
            left = deadline - time.monotonic()
            assert left > 0, f"not within {seconds} s; seen {[m['msg_type'] for m in self.messages]} {self.text}"
            message = self.client.get_iopub_msg(timeout=left)
            if message["parent_header"].get("msg_id") == self.msg_id:
                self.messages.append(message)
        return self

    def finish(self, seconds: float = 30.0) -> Seen:
        self.until(lambda seen: "idle" in seen.states, seconds)
        while True:
            reply = self.client.get_shell_msg(timeout=seconds)
            if reply["parent_header"].get("msg_id") == self.msg_id:
                self.reply = reply["content"]
                return self

    @property
    def states(self) -> list[str]:
        return [m["content"]["execution_state"] for m in self.messages if m["msg_type"] == "status"]

    @property
    def text(self) -> str:
        return "".join(m["content"]["text"] for m in self.messages if m["msg_type"] == "stream")

    @property
    def shown(self) -> list[str]:
        kinds = ("display_data", "update_display_data")
        return [m["content"]["data"].get("text/plain", "") for m in self.messages if m["msg_type"] in kinds]


def run(client: BlockingKernelClient, code: str, **kwargs: Any) -> Seen:
    return Seen(client, client.execute(code, **kwargs)).finish()
