"""A daemon for tests of a replica: answers docs/protocol.md, section 1, from memory; one log, any number of
replicas."""

from __future__ import annotations

import asyncio
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import zmq
from jupyter_client import BlockingKernelClient
from jupyter_client.connect import write_connection_file

from nbos_cluster import content, wire

Message = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]


class FakeDaemon:
    """Runs on a thread of its own. `refuse` maps n to a yield; `hold` keeps bids with wait in the queue."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log: list[tuple[Message, bytes]] = []
        self.blobs: dict[str, bytes] = {}
        self.seen: list[Message] = []
        self.applied: dict[int, int] = {}
        self.lost: dict[int, Message] = {}
        self.refuse: dict[int, Message] = {}
        self.fence: set[int] = set()
        self.hold = False
        self.durable = False
        self.frozen = False
        """The driver holds what a replica has on a device: a `thaw` brings nothing back before this is False."""
        self.lazy = 0
        self.store = "there"
        """Or "away": it says so; or "silent": it answers nothing."""
        self.room: int | None = None
        self.seconds_a_blob = 0.0
        self._disk_free_at = 0.0
        self.grant: Message | None = None
        self.claims: dict[int, int] = {}
        self.tokens = 100
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._held: dict[int, tuple[asyncio.StreamWriter, Message]] = {}
        self._servers: dict[int, asyncio.Server] = {}
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def path(self, index: int) -> str:
        return str(self.directory / f"r{index}.sock")

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def listen(self, index: int) -> None:
        Path(self.path(index)).unlink(missing_ok=True)

        async def start() -> None:
            self._servers[index] = await asyncio.start_unix_server(
                lambda r, w: self._serve(index, r, w), self.path(index)
            )

        self.call(start())

    def go_away(self, index: int) -> None:
        async def stop() -> None:
            self._servers.pop(index).close()
            if index in self._writers:
                self._writers.pop(index).close()

        self.call(stop())

    def push(self, index: int, message: Message, payload: bytes = b"") -> None:
        async def send() -> None:
            self._send(self._writers[index], message, payload)

        self.call(send())

    def close(self) -> None:
        for index in list(self._servers):
            self.go_away(index)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)

    async def _serve(self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                message, payload = await wire.read(reader)
                self.seen.append({**message, "from": index})
                if message["type"] == "arena":  # this daemon shares no memory: blobs come in their requests
                    writer.close()
                    return
                self._answer(index, writer, message, payload)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _send(self, writer: asyncio.StreamWriter, message: Message, payload: bytes = b"") -> None:
        for buffer in wire.pack(message, payload):
            writer.write(buffer)

    def _answer(self, index: int, writer: asyncio.StreamWriter, message: Message, payload: bytes) -> None:
        handler = getattr(self, "_on_" + message["type"])
        reply = handler(index, writer, message, payload)
        if reply is None:
            return
        if message["type"] == "put_blob" and self.seconds_a_blob:
            self._disk_free_at = max(self._disk_free_at, self.loop.time()) + self.seconds_a_blob
            self.loop.call_at(self._disk_free_at, self._send, writer, {"re": message["id"], "ok": True, **reply})
            return
        data = reply.pop("payload", b"")
        self._send(writer, {"re": message["id"], "ok": True, **reply}, data)
        if message["type"] == "hello":
            self._writers[index] = writer
            for entry, body in self.log[max(0, message["applied"]) :]:
                self._send(writer, {"type": "entry", "entry": entry}, body)

    def _on_hello(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        self.applied[index] = message["applied"]
        return {
            "kernel": "k",
            "replica": index,
            "host": f"host-{index}",
            "resources": {},
            "members": [],
            "durable": self.durable,
            "lazy": self.lazy,
        }

    def _on_bid(self, index: int, writer: Any, message: Message, payload: bytes) -> Message | None:
        n = message["n"]
        if n in self.refuse:
            return {"answer": "yield", **self.refuse[n]}
        if message["applied"] != n - 1 and n > 1:
            return {"answer": "yield", "code": "behind", "reason": f"applied {message['applied']}"}
        if self.hold and message["wait"]:
            self._held[n] = (writer, message)
            self._send(
                writer, {"type": "waiting", "n": n, "reason": "no room", "position": 1, "of": 1, "estimate": None}
            )
            return None
        self.tokens += 1
        self.claims[n] = self.tokens
        return {"answer": "lead", "token": self.tokens, "grant": self.grant}

    def answer_held(self, index: int) -> None:
        """The bids that were held lead now."""
        self.hold = False

        async def answer() -> None:
            for writer, message in self._held.values():
                reply = self._on_bid(index, writer, message, b"")
                self._send(writer, {"re": message["id"], "ok": True, **(reply or {})})
            self._held.clear()

        self.call(answer())

    def _on_cancel(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        held = self._held.pop(message["n"], None)
        if held is not None:
            self._send(
                held[0], {"re": held[1]["id"], "ok": True, "answer": "yield", "code": "cancelled", "reason": "left"}
            )
        return {}

    def _on_put_blob(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        assert content.address(payload) == message["hash"]
        self.blobs[message["hash"]] = payload
        return {}

    def _on_get_blob(self, index: int, writer: Any, message: Message, payload: bytes) -> Message | None:
        if self.store == "silent":
            return None
        if self.store == "away":
            return {"ok": False, "error": "away", "reason": "the store does not answer"}
        blob = self.blobs.get(message["hash"])
        return {"payload": blob, "size": len(blob)} if blob is not None else {"ok": False, "error": "missing"}

    def _on_have_blobs(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        return {"have": [digest for digest in message["hashes"] if digest in self.blobs]}

    def _on_room(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        return {"store": {"where": "the memory of a test", "free": self.room}, "standbys": []}

    def _on_append(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        entry = message["entry"]
        if entry["n"] in self.fence:
            return {"ok": False, "error": "fenced"}
        if entry["n"] > len(self.log):
            self.log.append((entry, payload))
            for stream in self._writers.values():
                self._send(stream, {"type": "entry", "entry": entry}, payload)
        return {}

    def _on_applied(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        self.applied[index] = message["n"]
        self.lost[index] = message["lost"]
        return {}

    def _on_release(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        return {}

    def _on_gave_back(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        return {}

    def _on_thaw(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        if not self.frozen:
            self._send(writer, {"type": "thawed"})
        return {}

    def _on_status(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        return {
            "last": len(self.log),
            "executor": 0,
            "next": len(self.log) + 1,
            "applied": {},
            "members": [],
            "lost": {},
        }

    def _on_outcome(self, index: int, writer: Any, message: Message, payload: bytes) -> Message:
        return {"state": "committed" if message["n"] <= len(self.log) else "free"}


class Client:
    """A plain Jupyter client that numbers its own requests, as the router does. `file`: the connection file."""

    def __init__(self, file: str) -> None:
        self.client = BlockingKernelClient(connection_file=file)
        self.client.load_connection_file()
        self.client.start_channels()

    def alive(self) -> bool:
        return True

    def stderr(self) -> str:
        return ""

    def ready(self) -> Self:
        """Both channels are through: a kernel_info_request was answered and its idle seen."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self.alive(), self.stderr()
            msg_id = self.client.kernel_info()
            try:
                self.shell(msg_id, "kernel_info_reply", timeout=1)
                self.outputs(msg_id, timeout=0.3)
            except (queue.Empty, AssertionError):
                continue
            return self
        raise AssertionError("the replica did not come up in 30 s")

    def send(self, code: str, n: int, wait: bool = False, kind: str = "execute_request", **content: Any) -> str:
        body = {
            "code": code,
            "silent": False,
            "store_history": True,
            "allow_stdin": True,
            "stop_on_error": True,
            **content,
        }
        message = self.client.session.msg(kind, body, metadata={"nbos_execution": {"n": n, "attempt": 1, "wait": wait}})
        self.client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def shell(self, msg_id: str, *kinds: str, timeout: float = 15) -> list[Message]:
        """Shell messages for one request, up to and including the first of `kinds`."""
        got: list[Message] = []
        while not got or got[-1]["msg_type"] not in kinds:
            message = self.client.get_shell_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") == msg_id:
                got.append(message)
        return got

    def control(self, kind: str, content: Message, timeout: float = 10) -> Message:
        message = self.client.session.msg(kind, content)
        self.client.control_channel.send(message)
        while True:
            reply: Message = self.client.get_control_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return reply

    def outputs(self, msg_id: str, timeout: float = 10) -> list[Message]:
        """iopub messages of one request up to idle; their topics stand under `topic`."""
        got: list[Message] = []
        while not (got and got[-1]["msg_type"] == "status" and got[-1]["content"]["execution_state"] == "idle"):
            message = self.iopub(timeout)
            if message["parent_header"].get("msg_id") == msg_id:
                got.append(message)
        return got

    def iopub(self, timeout: float = 10) -> Message:
        socket = self.client.iopub_channel.socket
        assert socket.poll(int(timeout * 1000)), "no output in time"
        topics, frames = self.client.session.feed_identities(socket.recv_multipart())
        return {**self.client.session.deserialize(frames), "topic": topics[0] if topics else b""}

    def run(self, code: str, n: int, **content: Any) -> Message:
        """Run to the commit; returns the reply."""
        msg_id = self.send(code, n, **content)
        got = self.shell(msg_id, "nbos_committed", "nbos_failed", "nbos_yield")
        assert got[-1]["msg_type"] == "nbos_committed", (got[-1]["content"], self.stderr())
        return next(m for m in got if m["msg_type"] == "execute_reply")

    def value(self, expression: str, n: int) -> str:
        reply = self.run("", n, user_expressions={"v": expression})
        found = reply["content"]["user_expressions"]["v"]
        return str(found["data"]["text/plain"] if found["status"] == "ok" else f"{found['ename']}: {found['evalue']}")

    def close(self) -> None:
        self.client.stop_channels()


class Kernel(Client):
    """A real replica process, and the client to it."""

    def __init__(self, daemon: FakeDaemon, index: int) -> None:
        self.daemon, self.index = daemon, index
        daemon.listen(index)
        self.file = str(daemon.directory / f"k{index}.json")
        public, secret = zmq.curve_keypair()
        write_connection_file(self.file, key=b"secret", ip="127.0.0.1", curve_publickey=public, curve_secretkey=secret)
        self.errors = open(daemon.directory / f"k{index}.err", "w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nbos_kernel", "--nbos-socket", daemon.path(index), "-f", self.file],
            start_new_session=True,
            stderr=self.errors,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "IPYTHONDIR": str(daemon.directory / "ipython"),
                "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            },
        )
        super().__init__(self.file)

    def alive(self) -> bool:
        return self.process.poll() is None

    def stderr(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def close(self) -> None:
        super().close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.errors.close()
