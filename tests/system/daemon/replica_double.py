"""A real process that speaks the replica's side of the daemon's socket, and does what a test tells it on another.

Started by the daemon like a replica: `python replica_double.py --nbos-socket PATH -f FILE`. It says hello, keeps
reconnecting, applies what is pushed, and listens on `<folder>/c` for JSON lines: {"send": message, "payload": hex},
{"pushed": type}, {"hello": {...}} to change what it says next time, {"raw": hex}, {"eat": bytes}, {"drop": true},
{"arena": true} to fetch shared memory, {"write": hex, "at": n}, {"read": size, "at": n} to use it,
{"files": [hash…]} to read blobs' files, {"cells": [first, last]}.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from nbos_cluster import files, wire
from nbos_cluster.arena import fetch


class Double:
    def __init__(self, path: str, connection: dict[str, Any]) -> None:
        self.path = path
        ports = {n: connection[f"{n}_port"] for n in ("shell", "iopub", "stdin", "control", "hb")}
        self.said = {"pid": os.getpid(), "python": "3", "ip": connection["ip"], "ports": ports, "running": None}
        self.applied = -1
        self.ids = 0
        self.hellos = 0
        self.pending: dict[int, tuple[asyncio.Future[Any], dict[str, Any], bytes]] = {}
        self.pushed: list[tuple[dict[str, Any], bytes]] = []
        self.hello_reply: dict[str, Any] = {}
        self.writer: asyncio.StreamWriter | None = None
        self.held: list[bytearray] = []
        self.arena: Any = None

    async def run(self) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self.path)
                await self.talk(reader, writer)
            except (OSError, asyncio.IncompleteReadError, wire.WireError):
                self.writer = None
                await asyncio.sleep(0.05)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = {"type": "hello", "id": 0, **self.said, "applied": self.applied}
        writer.writelines(wire.pack(hello))
        while True:
            message, payload = await wire.read(reader)
            if message.get("re") == 0:
                self.hello_reply = message
                self.hellos += message["ok"]  # not those before the daemon knew that it had started us
                if not message["ok"]:
                    writer.close()
                    raise OSError("refused")
                self.writer = writer
                for _, again, data in self.pending.values():
                    writer.writelines(wire.pack(again, data))
            elif "re" in message:
                future = self.pending.pop(message["re"])[0]
                future.set_result({**message, "payload": payload.hex()})
            else:
                self.take(message, payload)

    def take(self, message: dict[str, Any], payload: bytes) -> None:
        self.pushed.append((message, payload))
        if message["type"] == "exit":
            os._exit(0)
        if message["type"] == "state":
            self.applied = message["upto"]
        if message["type"] == "entry":
            assert message["n"] == self.applied + 1, (message["n"], self.applied)
            self.applied = message["n"]
        if message["type"] == "token" and self.said["running"]:
            self.said["running"] = {"n": message["n"], "token": message["token"]}

    async def request(self, message: dict[str, Any], payload: bytes) -> dict[str, Any]:
        self.ids += 1
        message = {**message, "id": self.ids}
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.pending[self.ids] = (future, message, payload)
        if self.writer is not None:
            self.writer.writelines(wire.pack(message, payload))
        reply: dict[str, Any] = await future
        if message["type"] == "bid" and reply.get("answer") == "lead":
            self.said["running"] = {"n": message["n"], "token": reply["token"]}
        if message["type"] == "append":
            self.said["running"] = None
            if reply["ok"]:
                self.applied = message["entry"]["n"]
        return reply

    async def cells(self, first: int, last: int) -> None:
        """Run these executions one after the other, each with a line of source and a small value."""
        for n in range(first, last + 1):
            bid = {"type": "bid", "n": n, "attempt": 1, "kind": "cell", "resources": {}, "wait": True}
            answer = await self.request({**bid, "applied": n - 1}, b"")
            value = b"%100d" % n
            component = {"names": ["x"], "digest": str(n), "frames": [{"size": len(value), "at": 0}]}
            entry = {"n": n, "kind": "cell", "execution_count": n, "source": f"x = {n}", "components": [component]}
            reply = await self.request({"type": "append", "entry": entry, "token": answer["token"]}, value)
            assert reply["ok"], reply
            told = asyncio.ensure_future(self.request({"type": "applied", "n": n, "lost": {}}, b""))
            if n == last:
                await told

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for line in reader:
            order = json.loads(line)
            writer.write(json.dumps(await self.obey(order)).encode() + b"\n")

    async def obey(self, order: dict[str, Any]) -> Any:
        if "send" in order:
            return await self.request(order["send"], bytes.fromhex(order.get("payload", "")))
        if "pushed" in order:
            return [m for m, _ in self.pushed if m["type"] == order["pushed"]]
        if "arena" in order:
            self.arena = await asyncio.to_thread(fetch, self.path)
            return self.arena.size
        if "files" in order:
            handles = await asyncio.to_thread(files.ask, self.path, order["files"])
            contents = [None if h is None else os.pread(h, 1 << 20, 0).hex() for h in handles]
            files.close(handles)
            return contents
        if "write" in order:
            data = bytes.fromhex(order["write"])
            self.arena.part(order["at"], len(data))[:] = data
        if "read" in order:
            return bytes(self.arena.part(order["at"], order["read"])).hex()
        if "cells" in order:
            await self.cells(*order["cells"])
        if "hello" in order:
            self.said.update(order["hello"])
        if "raw" in order and self.writer is not None:
            self.writer.write(bytes.fromhex(order["raw"]))
        if "drop" in order and self.writer is not None:
            self.writer.transport.abort()
        if "eat" in order:
            self.held.append(bytearray(os.urandom(1 << 20) * (order["eat"] >> 20)))
        return {
            "pid": os.getpid(),
            "applied": self.applied,
            "hello": self.hello_reply,
            "hellos": self.hellos,
            "connected": self.writer is not None,
            "environ": dict(os.environ),
            "cwd": os.getcwd(),
            "argv": sys.argv,
        }


async def main() -> None:
    double = Double(path, connection)
    await asyncio.start_unix_server(double.control, str(control), limit=1 << 26)
    await double.run()


path = sys.argv[sys.argv.index("--nbos-socket") + 1]
connection = json.loads(Path(sys.argv[sys.argv.index("-f") + 1]).read_text())
control = Path(path).parent / "c"
control.unlink(missing_ok=True)
asyncio.run(main())
