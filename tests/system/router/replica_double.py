"""A replica double: a real ipykernel that speaks docs/protocol.md §2, its election played by files in a directory.

The directory is daemon and etcd in one: `claims/<n>` (created exclusively, holds replica, token, pid), `log/<n>`
(status), `busy-<i>` (replica i has no room while it exists), `lost-host` (a dead claimer counts as a lost host).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from ipykernel.iostream import IOPubThread
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp

ROOT = Path(os.environ["DOUBLE_ROOT"])
INDEX = int(os.environ["DOUBLE_INDEX"])
TOKEN = 0
_SILENT: set[str] = set()

_plain_send = IOPubThread.send_multipart


def _send(self: Any, parts: list[Any], *args: Any, **kwargs: Any) -> None:
    first = bytes(parts[0])
    if first != b"<IDS|MSG>":
        parts = [b"nbos.%d." % TOKEN + first, *parts[1:]]
    _plain_send(self, parts, *args, **kwargs)


IOPubThread.send_multipart = _send


def committed() -> int:
    return max((int(path.name) for path in (ROOT / "log").iterdir()), default=0)


def claim(n: int) -> tuple[str, int]:
    """('lead', token) or (yield code, next)."""
    last = committed()
    if n <= last:
        return "stale", last + 1
    if n > last + 1:
        return "behind", last + 1
    tokens = ROOT / "tokens"
    with tokens.open("a") as file:
        file.write("x")
        file.flush()
        token = file.tell()
    try:
        with (ROOT / "claims" / str(n)).open("x") as file:
            json.dump({"replica": INDEX, "token": token, "pid": os.getpid()}, file)
    except FileExistsError:
        return "taken", n
    return "lead", token


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def outcome(n: int, abandon: bool) -> dict[str, Any]:
    entry, held = ROOT / "log" / str(n), ROOT / "claims" / str(n)
    if entry.exists():
        status = entry.read_text()
        if status.startswith("abandoned"):
            return {"state": "abandoned", "reason": status.partition(":")[2]}
        return {"state": "committed", "status": status, "execution_count": n}
    if held.exists():
        holder = json.loads(held.read_text())
        if alive(holder["pid"]):
            return {"state": "claimed", "replica": holder["replica"], "host": f"host-{holder['replica']}"}
        held.unlink()
        if not (ROOT / "lost-host").exists():
            entry.write_text("abandoned:its process died (signal 9)")
            return outcome(n, abandon)
    if abandon:
        entry.write_text("abandoned:given up")
        return outcome(n, abandon)
    return {"state": "free"}


class Double(IPythonKernel):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shell_handlers["nbos_sync_request"] = self.sync_request
        for name in ("status", "outcome", "cancel"):
            self.control_handlers[f"nbos_{name}_request"] = getattr(self, f"{name}_request")
        self.cancelled: set[int] = set()

    def _publish_status(self, status: str, channel: str, parent: Any = None) -> None:
        header = (parent or self.get_parent(channel) or {}).get("header", {})
        numbered = header.get("msg_type") == "execute_request" and not header.get("subshell_id")
        if numbered and (status == "busy" or header["msg_id"] in _SILENT):
            return
        super()._publish_status(status, channel, parent)

    async def execute_request(self, stream: Any, ident: Any, parent: Any) -> None:
        order = parent["metadata"].get("nbos_execution")
        if order is None:
            return await super().execute_request(stream, ident, parent)
        if not await self.bid(stream, ident, parent, order):
            _SILENT.add(parent["header"]["msg_id"])
            return
        _SILENT.discard(parent["header"]["msg_id"])
        await super().execute_request(stream, ident, parent)
        self._aborting = False
        (ROOT / "log" / str(order["n"])).write_text("ok")
        self.session.send(stream, "nbos_committed", {"n": order["n"]}, parent, ident=ident)

    def _abort_queues(self, subshell_id: Any = None) -> None:
        """The router aborts what is queued."""

    async def sync_request(self, stream: Any, ident: Any, parent: Any) -> None:
        order = parent["metadata"]["nbos_execution"]
        if await self.bid(stream, ident, parent, order):
            (ROOT / "log" / str(order["n"])).write_text("ok")
            (ROOT / "synced").touch()
            self.session.send(stream, "nbos_committed", {"n": order["n"]}, parent, ident=ident)

    async def bid(self, stream: Any, ident: Any, parent: Any, order: dict[str, Any]) -> bool:
        global TOKEN
        n = order["n"]
        busy = ROOT / f"busy-{INDEX}"
        told = False
        while busy.exists() and order["wait"] and n not in self.cancelled:
            if not told:
                told = True
                content = {"n": n, "reason": "needs 1 GPU", "position": 1, "of": 2, "host": f"host-{INDEX}"}
                self.session.send(stream, "nbos_waiting", content, parent, ident=ident)
            await asyncio.sleep(0.01)
        if n in self.cancelled:
            self.cancelled.discard(n)
            code, value = "cancelled", n
        elif busy.exists():
            code, value = "busy", n
        else:
            code, value = claim(n)
        if code != "lead":
            content = {"n": n, "code": code, "reason": "needs 1 GPU", "next": value}
            self.session.send(stream, "nbos_yield", content, parent, ident=ident)
            return False
        TOKEN = value
        content = {"n": n, "token": TOKEN, "host": f"host-{INDEX}", "grant": None}
        self.session.send(stream, "nbos_lead", content, parent, ident=ident)
        return True

    async def status_request(self, stream: Any, ident: Any, parent: Any) -> None:
        last = committed()
        content = {"last": last, "next": last + 1, "executor": -1, "applied": last}
        self.session.send(stream, "nbos_status_reply", content, parent, ident=ident)

    async def outcome_request(self, stream: Any, ident: Any, parent: Any) -> None:
        content = outcome(parent["content"]["n"], parent["content"]["abandon"])
        self.session.send(stream, "nbos_outcome_reply", content, parent, ident=ident)

    async def cancel_request(self, stream: Any, ident: Any, parent: Any) -> None:
        self.cancelled.add(parent["content"]["n"])
        self.session.send(stream, "nbos_cancel_reply", {}, parent, ident=ident)


if __name__ == "__main__":
    IPKernelApp.launch_instance(argv=["-f", sys.argv[1]], kernel_class=Double)
