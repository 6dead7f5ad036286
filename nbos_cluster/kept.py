"""What cells have shown, kept for a client that is away: the replica keeps it, and the router of a living server.

Guarantees: what is kept of a cell is the end of what it has shown, in order, nothing twice; how much of its beginning
is missing is known exactly; all that is kept stays within `Bounds`, whatever cells print; what a cell has cleared or
replaced itself is neither kept nor missing. No IO, no clock, the standard library only: this runs in the user's image.

A client is given all of a cell again, after a `clear_output`: that is right whatever it has seen of it before.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

PIECE = 4096
"""Characters of one stream's neighbouring texts that are kept as one message."""

OVERHEAD = 200
"""Bytes that a kept message costs besides its content."""

CELL = 1000
"""Bytes that a cell costs besides its code and what it has shown."""

MOST_CELLS = 2000
"""Cells that have ended and are still kept."""

SHOWN = frozenset({"stream", "display_data", "update_display_data", "execute_result", "error", "clear_output"})
"""The messages that change what stands below a cell."""

Content = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that is kept of one kernel: bytes, and messages (neighbouring texts of a stream are one). Zero bytes:
    nothing is."""

    size: int = 16 * 1024 * 1024
    messages: int = 10_000


@dataclass(slots=True)
class Piece:
    """One message, or neighbouring texts of one stream."""

    kind: str
    content: Content
    size: int
    messages: int = 1


@dataclass(slots=True)
class Cell:
    """One execution. `header`: of its request. `reply`: content of its execute_reply. `missing`: messages and bytes of
    its beginning that are not kept. `filed`: what it has shown stands in the notebook's file."""

    header: Content
    cell: str = ""
    code: str = ""
    count: int | None = None
    reply: Content | None = None
    ended: bool = False
    filed: bool = False
    missing: list[int] = field(default_factory=lambda: [0, 0])
    pieces: deque[Piece] = field(default_factory=deque)
    clearing: bool = False
    displays: set[str] = field(default_factory=set)
    """The display ids among them, so that an update finds its cells without looking at everything."""

    @property
    def msg_id(self) -> str:
        return str(self.header.get("msg_id", ""))

    @property
    def session(self) -> str:
        return str(self.header.get("session", ""))


class Kept:
    """The cells of one kernel, oldest first."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.cells: OrderedDict[str, Cell] = OrderedDict()
        self.size = 0
        self.messages = 0

    # -- in

    def begin(self, header: Content, cell: str = "", code: str = "") -> None:
        """A cell's request. One that runs again (its executor was lost) goes on with what it has shown."""
        if not self.bounds.size or not header.get("msg_id"):
            return
        found = self.cells.get(header["msg_id"])
        if found is not None:
            found.ended, found.reply = False, None
            return
        if cell:
            self.forget([other.msg_id for other in self.cells.values() if other.cell == cell and other.ended])
        new = Cell(header, cell, code[: self.bounds.size])
        self.cells[new.msg_id] = new
        self._charge(CELL + len(new.code), 0)
        self._fit()

    def add(self, msg_id: str, kind: str, content: Content, size: int) -> None:
        """A message in this cell's output; `size`: bytes of its content."""
        cell = self.cells.get(msg_id)
        if cell is None or kind not in SHOWN:
            return
        if kind == "clear_output":
            if content.get("wait"):
                cell.clearing = True
            else:
                self._clear(cell)
            return
        if kind == "update_display_data":
            self._update(cell, content)
            return
        if cell.clearing:
            self._clear(cell)
        if not self._joined(cell, kind, content, size):
            cell.pieces.append(Piece(kind, content, size + OVERHEAD))
            if kind != "stream" and (shown := _display_id(content)):
                cell.displays.add(shown)
            self._charge(size + OVERHEAD, 1)
        self._fit()

    def counted(self, msg_id: str, count: int) -> None:
        """Its execution_count is known."""
        if msg_id in self.cells:
            self.cells[msg_id].count = count

    def replied(self, msg_id: str, content: Content) -> None:
        if msg_id in self.cells:
            self.cells[msg_id].reply = content

    def ended(self, msg_id: str) -> bool:
        """It is idle; whether it is a cell that is kept and had not ended."""
        cell = self.cells.get(msg_id)
        if cell is None or cell.ended:
            return False
        cell.ended = True
        self._fit()
        return True

    def forget(self, msg_ids: Iterable[str]) -> None:
        for msg_id in list(msg_ids):
            cell = self.cells.pop(msg_id, None)
            if cell is not None:
                self._charge(-CELL - len(cell.code), 0)
                self._drop(cell)

    def file(self, msg_ids: Collection[str]) -> None:
        """What these cells have shown stands in the notebook's file."""
        for msg_id in msg_ids:
            if msg_id in self.cells:
                self.cells[msg_id].filed = True

    # -- out

    def dump(self) -> list[Content]:
        """Everything, for `load`."""
        return [
            {
                "header": cell.header,
                "cell": cell.cell,
                "code": cell.code,
                "count": cell.count,
                "reply": cell.reply,
                "ended": cell.ended,
                "filed": cell.filed,
                "missing": list(cell.missing),
                "clearing": cell.clearing,
                "pieces": [[piece.kind, piece.content, piece.size, piece.messages] for piece in cell.pieces],
            }
            for cell in self.cells.values()
        ]

    def load(self, dumped: Iterable[Content]) -> None:
        """Take over what another one has kept; of a cell that both know, the other's word counts."""
        for entry in dumped:
            entry = dict(entry)
            pieces = [Piece(*piece) for piece in entry.pop("pieces")]
            shown = {found for piece in pieces if (found := _display_id(piece.content))}
            cell = Cell(**entry, pieces=deque(pieces), displays=shown)
            self.forget([cell.msg_id])
            self.cells[cell.msg_id] = cell
            self._charge(CELL + len(cell.code), 0)
            for piece in pieces:
                self._charge(piece.size, 1)
        self._fit()

    # -- within

    def _joined(self, cell: Cell, kind: str, content: Content, size: int) -> bool:
        last = cell.pieces[-1] if cell.pieces else None
        if kind != "stream" or last is None or last.kind != "stream" or last.size >= PIECE:
            return False
        if last.content.get("name") != content.get("name"):
            return False
        last.content = {**last.content, "text": f"{last.content.get('text', '')}{content.get('text', '')}"}
        last.size += size
        last.messages += 1
        self._charge(size, 0)
        return True

    def _update(self, cell: Cell, content: Content) -> None:
        """Shown again in place, in this cell or in an earlier one."""
        wanted = _display_id(content)
        for each in [cell for cell in self.cells.values() if wanted in cell.displays]:
            for piece in each.pieces:
                if _display_id(piece.content) == wanted:
                    new = {**piece.content, "data": content.get("data"), "metadata": content.get("metadata")}
                    size = len(json.dumps(new)) + OVERHEAD
                    self._charge(size - piece.size, 0)
                    piece.content, piece.size = new, size
        self._fit()

    def _clear(self, cell: Cell) -> None:
        self._drop(cell)
        cell.clearing, cell.missing = False, [0, 0]

    def _drop(self, cell: Cell) -> None:
        for piece in cell.pieces:
            self._charge(-piece.size, -1)
        cell.pieces.clear()
        cell.displays.clear()

    def _charge(self, size: int, messages: int) -> None:
        self.size += size
        self.messages += messages

    def _fit(self) -> None:
        """Thin the oldest, of ended cells first; then forget the oldest cells that hold nothing but themselves."""
        while len(self.cells) > MOST_CELLS and (ended := self._oldest_ended()):
            self.forget([ended])
        while self.size > self.bounds.size or self.messages > self.bounds.messages:
            cell = next(self._thinnable(), None)
            if cell is not None:
                piece = cell.pieces.popleft()
                self._charge(-piece.size, -1)
                cell.missing[0] += piece.messages
                cell.missing[1] += piece.size - OVERHEAD
                continue
            ended = self._oldest_ended()
            if not ended:
                return
            self.forget([ended])

    def _oldest_ended(self) -> str:
        return next((cell.msg_id for cell in self.cells.values() if cell.ended), "")

    def _thinnable(self) -> Iterator[Cell]:
        yield from (cell for cell in self.cells.values() if cell.pieces and cell.ended)
        yield from (cell for cell in self.cells.values() if cell.pieces)


def _display_id(content: Content) -> str:
    transient = content.get("transient")
    return str(transient.get("display_id") or "") if isinstance(transient, dict) else ""


def note(cell: Cell | Content, bounds: Bounds) -> str:
    """What to say where the beginning of a cell's output is missing; empty where nothing is."""
    messages, size = cell.missing if isinstance(cell, Cell) else cell["missing"]
    if not messages:
        return ""
    return (
        f"NBOS: {messages:,} earlier messages of this cell ({size / 1e6:,.1f} MB) were not kept while nobody listened "
        f"(at most {bounds.size / 1e6:,.0f} MB and {bounds.messages:,} messages of a kernel are: "
        "NBOSProvisioner.keep_bytes, keep_messages)\n"
    )
