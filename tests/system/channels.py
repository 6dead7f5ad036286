"""A kernel's websocket as a browser sees it: what was sent, what came back, in order and with the time.

Guarantees: nothing waits without a deadline; a message is given to the cell whose request is its parent and
to nobody else; when the websocket closes, every cell that still waits ends with ConnectionLost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from tests.system.messages import SUBPROTOCOL, Json, Message, pack_legacy, pack_v1, unpack_legacy, unpack_v1

OUTPUT_TYPES = frozenset({"stream", "display_data", "update_display_data", "execute_result", "error", "clear_output"})
MAX_MESSAGE = 256 * 1024 * 1024


class ConnectionLost(ConnectionError):
    """The kernel's websocket closed while something waited for a message on it."""


@dataclass(frozen=True)
class Result:
    """What one request gave: its reply and, in the order of arrival, everything published for it."""

    reply: Json
    messages: tuple[Message, ...]
    sent: float
    replied: float
    finished: float

    @property
    def outputs(self) -> list[Message]:
        return [message for message in self.messages if message.type in OUTPUT_TYPES]

    @property
    def states(self) -> list[str]:
        return [m.content["execution_state"] for m in self.messages if m.type == "status"]

    @property
    def status(self) -> str:
        return str(self.reply.get("status"))

    @property
    def stdout(self) -> str:
        return _text(self.messages, "stdout")

    @property
    def stderr(self) -> str:
        return _text(self.messages, "stderr")

    @property
    def error(self) -> str:
        """`Name: value` of the error in the reply, empty when there is none."""
        return f"{self.reply.get('ename')}: {self.reply.get('evalue')}" if self.status == "error" else ""

    @property
    def value(self) -> str:
        """text/plain of the cell's result, empty when it has none."""
        results = [m.content["data"] for m in self.messages if m.type == "execute_result"]
        return str(results[-1].get("text/plain", "")) if results else ""

    @property
    def seconds(self) -> float:
        """From the request to its reply."""
        return self.replied - self.sent


def _text(messages: Sequence[Message], name: str) -> str:
    streams = [m.content for m in messages if m.type == "stream"]
    return "".join(content["text"] for content in streams if content["name"] == name)


@dataclass
class Cell:
    """A request under way. Wait for its result, or for a message of it on the way there."""

    msg_id: str
    sent: float
    code: str | None = None
    """Of an execute_request."""
    messages: list[Message] = field(default_factory=list)
    inputs: list[Message] = field(default_factory=list)
    reply: Message | None = None
    replies: int = 0
    idle: Message | None = None
    lost: str = ""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def wait(self, what: Callable[[Cell], bool], described: str, timeout: float) -> None:
        """Until `what` holds. TimeoutError and ConnectionLost tell what had arrived."""
        async with self.changed:
            try:
                async with asyncio.timeout(timeout):
                    await self.changed.wait_for(lambda: what(self) or bool(self.lost))
            except TimeoutError:
                raise TimeoutError(f"no {described} within {timeout:g} s; {self.story()}") from None
        if not what(self):
            raise ConnectionLost(f"no {described}: {self.lost}; {self.story()}")

    async def result(self, timeout: float = 30.0) -> Result:
        """The finished request: reply and idle have both arrived."""
        await self.wait(lambda cell: cell.reply is not None and cell.idle is not None, "reply and idle", timeout)
        if self.reply is None or self.idle is None:  # pragma: no cover - wait() has seen both
            raise AssertionError
        reply, idle = self.reply, self.idle
        return Result(reply.content, tuple(self.messages), self.sent, reply.at, max(reply.at, idle.at))

    async def text(self, fragment: str, timeout: float = 30.0) -> float:
        """Wait until stdout, stderr or an error holds `fragment`; the seconds since the request."""
        await self.wait(lambda cell: fragment in cell.written(), f"output with {fragment!r}", timeout)
        return self.messages[-1].at - self.sent

    async def asked(self, number: int = 1, timeout: float = 30.0) -> Message:
        """The number-th input_request of this cell."""
        await self.wait(lambda cell: len(cell.inputs) >= number, "input_request", timeout)
        return self.inputs[number - 1]

    def written(self) -> str:
        texts = []
        for message in self.messages:
            content = message.content
            data = content.get("data") if isinstance(content.get("data"), dict) else {}
            texts += [str(content.get("text", "")), *content.get("traceback", [])]
            texts += [str(text) for mime, text in (data or {}).items() if mime.startswith("text/")]
            texts += [str(content["evalue"])] if "evalue" in content else []
        return "".join(texts)

    def story(self) -> str:
        got = ", ".join(message.type for message in self.messages[-12:]) or "nothing"
        reply = "no reply" if self.reply is None else f"reply {self.reply.content.get('status')}"
        text = self.written()[-400:]
        return f"{reply}; {len(self.messages)} messages on iopub, the last: {got}; text: {text!r}"


class Channels:
    """One open websocket to one kernel."""

    def __init__(self, socket: WebSocketClientConnection, session: str, subprotocol: str) -> None:
        self._socket = socket
        self._session = session
        self.subprotocol = subprotocol
        self._cells: dict[str, Cell] = {}
        self.unclaimed: list[Message] = []
        """Messages on iopub whose parent is no request of this connection (kernel restarts, comms, other
        clients).
        """
        self.closed = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, url: str, headers: dict[str, str], timeout: float = 30.0, session: str = "") -> Channels:
        """Connect to `url` (ws://…/api/kernels/<id>/channels), the way JupyterLab does: with the v1
        subprotocol, and without one when nobody on the way confirms it.
        """
        session = session or uuid.uuid4().hex
        request = HTTPRequest(f"{url}?session_id={session}", headers=headers, connect_timeout=timeout)
        async with asyncio.timeout(timeout):
            socket = await websocket_connect(request, subprotocols=[SUBPROTOCOL], max_message_size=MAX_MESSAGE)
            if socket.protocol is not None and socket.selected_subprotocol == SUBPROTOCOL:
                return cls(socket, session, SUBPROTOCOL)
            socket.close()
            plain = HTTPRequest(request.url, headers=headers, connect_timeout=timeout)
            return cls(await websocket_connect(plain, max_message_size=MAX_MESSAGE), session, "")

    async def close(self) -> None:
        self._socket.close()
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        await self._lose("the test closed it")

    @property
    def session(self) -> str:
        return self._session

    def go_on(self, before: Channels) -> None:
        """Take up what waited on an earlier websocket of this session, as a page does that reconnects."""
        assert before.session == self._session
        self._cells = before._cells
        for cell in self._cells.values():
            cell.lost = ""

    async def submit(
        self,
        code: str,
        *,
        silent: bool = False,
        metadata: Json | None = None,
        allow_stdin: bool = True,
        stop_on_error: bool = True,
        store_history: bool = True,
        user_expressions: Json | None = None,
        subshell_id: str | None = None,
    ) -> Cell:
        """Send an execute_request and return the cell under way."""
        content = {
            "code": code,
            "silent": silent,
            "store_history": store_history and not silent,
            "user_expressions": user_expressions or {},
            "allow_stdin": allow_stdin,
            "stop_on_error": stop_on_error,
        }
        header = {} if subshell_id is None else {"subshell_id": subshell_id}
        return await self.send("execute_request", content, metadata=metadata, header=header)

    async def execute(self, code: str, timeout: float = 30.0, **options: Any) -> Result:
        return await (await self.submit(code, **options)).result(timeout)

    async def send(
        self,
        msg_type: str,
        content: Json,
        *,
        channel: str = "shell",
        metadata: Json | None = None,
        header: Json | None = None,
        parent: Json | None = None,
        buffers: Sequence[bytes] = (),
    ) -> Cell:
        """Send any message; the returned cell collects what comes back for it."""
        full = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": msg_type,
            "username": "",
            "session": self._session,
            "date": datetime.now(UTC).isoformat(),
            "version": "5.4",
            **(header or {}),
        }
        message = Message(channel, full, parent or {}, metadata or {}, content, tuple(buffers))
        frame = pack_v1(message) if self.subprotocol else pack_legacy(message)
        cell = self._cells[full["msg_id"]] = Cell(
            full["msg_id"], time.perf_counter(), content.get("code") if msg_type == "execute_request" else None
        )
        if self.closed.is_set():
            raise ConnectionLost("the websocket is closed; open a new one")
        await self._socket.write_message(frame, binary=isinstance(frame, bytes))
        return cell

    async def request(self, msg_type: str, content: Json, *, channel: str = "shell", timeout: float = 30.0) -> Json:
        """The content of the reply to any request."""
        cell = await self.send(msg_type, content, channel=channel)
        await cell.wait(lambda c: c.reply is not None, f"reply to {msg_type}", timeout)
        return cell.reply.content if cell.reply else {}

    def published(self) -> list[Message]:
        """Everything that came on iopub so far, whatever its parent."""
        return [*self.unclaimed, *(message for cell in self._cells.values() for message in cell.messages)]

    def unaccounted(self) -> list[str]:
        """Every execute_request so far that did not get one busy, one reply and one idle, in words."""
        wrong = []
        for cell in self._cells.values():
            states = [m.content["execution_state"] for m in cell.messages if m.type == "status"]
            if cell.code is not None and (states != ["busy", "idle"] or cell.replies != 1):
                wrong.append(f"{cell.code!r}: {states}, {cell.replies} replies")
        return wrong

    async def complete(self, code: str, cursor: int | None = None, timeout: float = 30.0) -> Json:
        position = len(code) if cursor is None else cursor
        return await self.request("complete_request", {"code": code, "cursor_pos": position}, timeout=timeout)

    async def inspect(self, code: str, cursor: int | None = None, timeout: float = 30.0) -> Json:
        position = len(code) if cursor is None else cursor
        content = {"code": code, "cursor_pos": position, "detail_level": 0}
        return await self.request("inspect_request", content, timeout=timeout)

    async def info(self, timeout: float = 30.0) -> Json:
        return await self.request("kernel_info_request", {}, timeout=timeout)

    async def answer(self, asked: Message, value: str) -> None:
        """Reply to an input_request."""
        await self.send("input_reply", {"value": value}, channel="stdin", parent=asked.header)

    async def comm_open(self, target: str, data: Json, comm_id: str | None = None) -> tuple[str, Cell]:
        """Open a comm from the front end; its id and the message under way."""
        comm = comm_id or uuid.uuid4().hex
        return comm, await self.send("comm_open", {"comm_id": comm, "target_name": target, "data": data})

    async def comm_msg(self, comm_id: str, data: Json, buffers: Sequence[bytes] = ()) -> Cell:
        return await self.send("comm_msg", {"comm_id": comm_id, "data": data}, buffers=buffers)

    async def _read(self) -> None:
        while True:
            frame = await self._socket.read_message()
            if frame is None:
                await self._lose(f"the server closed the websocket (code {self._socket.close_code})")
                return
            if self.subprotocol and isinstance(frame, bytes):
                await self._dispatch(unpack_v1(frame))
            else:
                await self._dispatch(unpack_legacy(frame))

    async def _dispatch(self, message: Message) -> None:
        cell = self._cells.get(message.parent.get("msg_id", ""))
        if cell is None:
            self.unclaimed.append(message)
            return
        async with cell.changed:
            _add(cell, message)
            cell.changed.notify_all()

    async def _lose(self, why: str) -> None:
        self.closed.set()
        for cell in self._cells.values():
            async with cell.changed:
                cell.lost = cell.lost or why
                cell.changed.notify_all()


def _add(cell: Cell, message: Message) -> None:
    if message.channel == "iopub":
        cell.messages.append(message)
        if message.type == "status" and message.content["execution_state"] == "idle":
            cell.idle = message
    elif message.channel == "stdin":
        cell.inputs.append(message)
    else:
        cell.reply = message
        cell.replies += 1
