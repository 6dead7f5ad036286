"""What this kernel's cells have shown, kept in the router and given again to a client that was away (docs/outputs.md).

Guarantees: what a client is given again is all that is kept of its cells, in order, after a `clear_output`, so that it
is right whatever had reached it before; outputs that follow come after it. It goes to the websockets of that client's
session only. What a replica kept while there was no router is taken over at its place between its outputs.
"""

from __future__ import annotations

from typing import Any

from nbos_cluster.kept import SHOWN, Bounds, Cell, Content, Kept, note

from .fleet import Fleet
from .instructions import Instruction, Publish, ToClient
from .messages import BadMessage, Message, load, parse, raw, text
from .outbox import Outbox

AGAIN = b"nbos.again."
"""Topic of what is given again, before the session that it is for. Nobody else's websocket passes it on."""

LONGEST = 256 * 1024
"""Characters of one stream message that is given again."""

_COUNTED = frozenset({"status", "execute_input"})


class Keeping:
    def __init__(self, fleet: Fleet, out: Outbox, bounds: Bounds) -> None:
        self.fleet, self.out = fleet, out
        self.kept = Kept(bounds)
        self._parent, self._of = b"", ""
        self._speaker = out.signer.session
        self._adopted: set[str] = set()
        """Cells that run and began under another router: their reply goes to that one, their replica keeps it."""

    # -- what passes

    def begin(self, request: Message) -> None:
        content = request.content
        if not content.get("silent"):
            metadata = request.metadata
            self.kept.begin(request.header, str(metadata.get("cellId") or ""), str(content.get("code", "")))

    def see(self, items: list[Instruction]) -> None:
        """What is published and answered in one step."""
        for item in items:
            if type(item) is Publish:
                self._published(item.frames)
            elif type(item) is ToClient and item.channel == "shell":
                self._answered(item.frames)

    def _published(self, frames: list[Any]) -> None:
        if len(frames) < 7:
            return
        parent = raw(frames[4])
        if parent != self._parent:
            self._parent = bytes(parent)
            self._of = str(load(frames[4], "parent header").get("msg_id", ""))
        cell = self.kept.cells.get(self._of)
        if cell is None or text(frames[0]).startswith(AGAIN):
            return
        kind = "stream"
        if not text(frames[0]).startswith(b"stream."):
            header = load(frames[3], "header")
            kind = str(header.get("msg_type", ""))
            if header.get("username") != "nbos":
                self._speaker = str(header.get("session", ""))
        if kind not in SHOWN and kind not in _COUNTED:
            return
        content = load(frames[6], "content")
        if kind == "execute_input":
            self.kept.counted(self._of, content.get("execution_count", 0))
        elif kind == "status":
            if content.get("execution_state") == "idle" and self.kept.ended(self._of):
                self._over(cell)
        else:
            self.kept.add(self._of, kind, content, len(raw(frames[6])))

    def _answered(self, frames: list[Any]) -> None:
        if not self.kept.cells:
            return
        message = parse(frames)
        of = str(message.parent.get("msg_id", ""))
        cell = self.kept.cells.get(of)
        if cell is not None and cell.reply is None and message.msg_type == "execute_reply":
            self.kept.replied(of, message.content)
            if cell.ended:
                self._over(cell)

    def _over(self, cell: Cell) -> None:
        """It has ended. Its reply is known, or was said to a router that is gone: then its replica knows it."""
        if cell.reply is not None:
            self.out.tell({"event": "cell_ended", "msg_id": cell.msg_id, "session": cell.session})
        elif self.fleet.executor is not None and self.fleet.executor in self.fleet.up:
            self.adopt(self.fleet.executor)

    # -- what was shown while there was no router

    def adopt(self, replica: int) -> None:
        """Ask for what this replica has kept."""
        if self.kept.bounds.size:
            self.out.ask(replica, "nbos_outputs_request", {"publish": True})

    def found(self, content: Content) -> None:
        """What a replica has kept of cells that began under another router."""
        # A replica runs user code: its word may be anything.
        ours = {cell.msg_id for cell in self.kept.cells.values()} - self._adopted
        try:
            theirs = [entry for entry in content.get("cells", []) if entry["header"]["msg_id"] not in ours]
            self.kept.load(theirs)
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise BadMessage(f"what a replica has kept cannot be read: {err!r}") from err
        new = [cell for cell in self.kept.cells.values() if cell.msg_id not in ours]
        self._adopted = {cell.msg_id for cell in new if not cell.ended}
        self.say_busy()
        for cell in new:
            if cell.ended and cell.reply is not None:
                self.out.tell({"event": "cell_ended", "msg_id": cell.msg_id, "session": cell.session})
        for session in {cell.session for cell in new}:
            self.give(session)

    def say_busy(self) -> None:
        """Tell a server that has just begun to listen, and would take the kernel for idle, of a cell that runs on."""
        for msg_id in self._adopted:
            cell = self.kept.cells.get(msg_id)
            if cell is not None and not cell.ended:
                self.out.status("busy", cell.header)

    def forget(self) -> None:
        """The kernel was restarted."""
        self.kept.forget(list(self.kept.cells))

    # -- what is asked

    def asked(self, request: Message) -> None:
        """`nbos_outputs_request` of the Jupyter Server. session: give its cells again; read: answer with everything;
        forget, file: requests whose outputs are settled."""
        content = request.content
        forget, file = content.get("forget") or [], content.get("file") or []
        if forget or file:
            self.kept.forget(forget)
            self.kept.file(file)
            for replica in sorted(self.fleet.up):
                self.out.ask(replica, "nbos_outputs_request", {"forget": forget, "file": file})
        if content.get("session"):
            self.give(str(content["session"]))
        if content.get("read"):
            cells = [{**entry, "note": note(entry, self.kept.bounds)} for entry in self.kept.dump()]
            self.out.reply(request, {"status": "ok", "cells": cells}, "control")

    def give(self, session: str) -> None:
        """Everything that is kept of this session's cells, to it."""
        for cell in self.kept.cells.values():
            if cell.session == session:
                self._give(cell)

    def _give(self, cell: Cell) -> None:
        if not cell.ended:
            self._say(cell, "status", {"execution_state": "busy"})
        self._say(cell, "clear_output", {"wait": False})
        for kind, content in shown(cell, note(cell, self.kept.bounds)):
            self._say(cell, kind, content)
        if cell.ended:
            self._say(cell, "status", {"execution_state": "idle"})
        if cell.reply is not None:  # which may have come while nobody listened, also before the cell's idle
            frames = self._made(cell, "execute_reply", cell.reply)
            self.out.append(ToClient("shell", [cell.session.encode(), *frames]))

    def _say(self, cell: Cell, kind: str, content: Content) -> None:
        self.out.append(Publish([AGAIN + cell.session.encode(), *self._made(cell, kind, content)]))

    def _made(self, cell: Cell, kind: str, content: Content) -> list[Any]:
        # JupyterLab drops what waits to be handled when the next message has another session: it must be the replica's.
        return self.out.signer.make(kind, content, cell.header, speaker=self._speaker)[1]


def shown(cell: Cell, before: str = "") -> list[tuple[str, Content]]:
    """The messages that show what is kept of a cell; neighbouring texts of a stream in one."""
    messages: list[tuple[str, Content]] = []
    if before:
        messages.append(("stream", {"name": "stderr", "text": before}))
    texts: list[str] = []
    name, length = "", 0

    def flush() -> None:
        if texts:
            messages.append(("stream", {"name": name, "text": "".join(texts)}))
            texts.clear()

    for piece in cell.pieces:
        if piece.kind != "stream" or piece.content.get("name") != name or length > LONGEST:
            flush()
            length = 0
        if piece.kind == "stream":
            name = str(piece.content.get("name"))
            texts.append(str(piece.content.get("text", "")))
            length += len(texts[-1])
        else:
            name = ""
            messages.append((piece.kind, piece.content))
    flush()
    if cell.clearing:
        messages.append(("clear_output", {"wait": True}))
    return messages
