"""Keeps what the cells of this replica have shown, for a router that comes when they have run for a while.

The Jupyter Server and its router may be gone while a cell runs: what it publishes then reaches nobody. The next router
asks for what was kept (docs/outputs.md).

Threads: `see` and `publish` belong to the IOPub thread, so that what was kept and what follows it leave in their order;
the others may be called from any.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jupyter_client.session import DELIM

from nbos_cluster.kept import SHOWN, Bounds, Kept

Message = dict[str, Any]

TOPIC = b"nbos_outputs"


class Keeper:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept = Kept(Bounds(0, 0))
        self._parent, self._of = b"", ""

    def begin(self, request: Message) -> None:
        """A cell is about to run here; how much to keep stands in its number's order."""
        metadata = request.get("metadata") or {}
        size, messages = (metadata.get("nbos_execution") or {}).get("keep") or (0, 0)
        content = request.get("content") or {}
        if content.get("silent"):
            return
        with self._lock:
            self._kept.bounds = Bounds(int(size), int(messages))
            header = {key: _plain(value) for key, value in request["header"].items()}
            self._kept.begin(header, str(metadata.get("cellId") or ""), str(content.get("code", "")))

    def replied(self, msg_id: str, content: Message) -> None:
        with self._lock:
            self._kept.replied(msg_id, content)

    def settle(self, forget: Sequence[str], file: Sequence[str]) -> None:
        """What the router says need not be kept, or stands in the notebook's file."""
        with self._lock:
            self._kept.forget(forget)
            self._kept.file(file)

    def see(self, frames: Sequence[Any]) -> None:
        """A message leaves: the topic, if it has one, then what Session made."""
        if not self._kept.cells:
            return
        at = 0 if bytes(frames[0]) == DELIM else 1
        parent = bytes(frames[at + 3])
        if parent != self._parent:
            self._parent, self._of = parent, str(json.loads(parent).get("msg_id", ""))
        if self._of not in self._kept.cells:
            return
        stream = at and bytes(frames[0]).startswith(b"stream.")
        kind = "stream" if stream else json.loads(bytes(frames[at + 2])).get("msg_type", "")
        if kind in SHOWN or kind in ("status", "execute_input"):
            self._take(kind, bytes(frames[at + 5]))

    def _take(self, kind: str, raw: bytes) -> None:
        content = json.loads(raw)
        with self._lock:
            if kind == "execute_input":
                self._kept.counted(self._of, content.get("execution_count"))
            elif kind == "status":
                if content.get("execution_state") == "idle":
                    self._kept.ended(self._of)
            else:
                self._kept.add(self._of, kind, content, len(raw))

    def dump(self) -> Message:
        with self._lock:
            return {"cells": self._kept.dump()}


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
