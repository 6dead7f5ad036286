"""Outputs whose browser is gone reach the notebook: written into its file when another page opens it (docs/outputs.md).

Guarantees: only cells whose own session has no open websocket are written, so that no file changes under the page
that shows it; each one that has ended is written once; a file that cannot be written stays as it is, and the outputs
stay kept. What its browser has certainly been given is forgotten.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

from jupyter_client.session import Session
from jupyter_core.utils import ensure_async
from jupyter_server.services.contents.handlers import ContentsHandler
from nbformat import NotebookNode, v4

from .websocket import is_nbos, open_websocket

CERTAIN = 100.0
"""Seconds a websocket has to stay open after a cell's end, for its outputs to have arrived: a lid that was closed is
noticed by the server's pings (every 30 s, answered within 30)."""

PATIENCE = 5.0
"""Seconds in which a kernel's router has to say what it keeps."""

RUNS = (
    "NBOS: this cell still runs, for a page that is closed. Reload this page to see what it has shown since; "
    "interrupt works from here.\n"
)


class Filing:
    """What of the kept outputs is settled, and how. One per server, on its event loop."""

    def __init__(self, kernels: Any, sessions: Any, contents: Any, log: Any) -> None:
        self._kernels, self._sessions, self._contents, self._log = kernels, sessions, contents, log
        self._ended: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._timed: set[tuple[str, str]] = set()
        self._writing = asyncio.Lock()

    # -- what has certainly arrived

    def ended(self, kernel_id: str, session: str, msg_id: str) -> None:
        """A cell has ended."""
        self._ended[kernel_id, session].append(msg_id)
        self.connected(kernel_id, session)

    def connected(self, kernel_id: str, session: str) -> None:
        """This session's websocket is open: when it still is in a while, what was sent has arrived."""
        handler, sent = open_websocket(kernel_id, session), list(self._ended.get((kernel_id, session), ()))
        if handler is not None and sent and (kernel_id, session) not in self._timed:
            self._timed.add((kernel_id, session))
            loop = asyncio.get_running_loop()
            loop.call_later(CERTAIN, self._arrived, kernel_id, session, handler, sent)

    def _arrived(self, kernel_id: str, session: str, handler: Any, sent: list[str]) -> None:
        self._timed.discard((kernel_id, session))
        if kernel_id not in self._kernels:
            self._ended.pop((kernel_id, session), None)
            return
        if open_websocket(kernel_id, session) is handler:
            self._tell(kernel_id, {"forget": sent})
            arrived = set(sent)
            left = [msg_id for msg_id in self._ended.pop((kernel_id, session), []) if msg_id not in arrived]
            if left:
                self._ended[kernel_id, session] = left
        self.connected(kernel_id, session)  # what has ended since, or a later websocket

    # -- what goes into the file

    async def before_reading(self, path: str) -> None:
        """Called when somebody asks for the notebook at `path`, before it is read."""
        async with self._writing:
            for session in await self._sessions.list_sessions():
                kernel_id = (session.get("kernel") or {}).get("id", "")
                if session.get("path") == path.strip("/") and kernel_id in self._kernels:
                    await self._write(kernel_id, path)

    async def _write(self, kernel_id: str, path: str) -> None:
        if not is_nbos(self._kernels.get_kernel(kernel_id)):
            return
        try:
            cells = [cell for cell in await self._kept(kernel_id) if self._unseen(kernel_id, cell)]
            if not cells:
                return
            model = await ensure_async(self._contents.get(path, type="notebook", content=True))
            for cell in cells:
                place(model["content"], cell)
            await ensure_async(self._contents.save(model, path))
        except Exception as err:  # noqa: BLE001  (whatever is wrong with this file, it must be readable as it is)
            self._log.warning("the outputs kept for %s are not in its file yet: %s", path, err)
            return
        done = [str(cell["header"]["msg_id"]) for cell in cells if cell["ended"]]
        self._tell(kernel_id, {"file": done})
        self._log.info("the outputs of %d cells were written into %s, %d have ended", len(cells), path, len(done))

    def _unseen(self, kernel_id: str, cell: dict[str, Any]) -> bool:
        mine = open_websocket(kernel_id, str(cell["header"].get("session", "")))
        return bool(cell["cell"]) and not cell["filed"] and mine is None

    async def _kept(self, kernel_id: str) -> list[dict[str, Any]]:
        """All that the kernel's router keeps. Raises TimeoutError."""
        heard: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        stream, session = self._stream(kernel_id)
        stream.on_recv(lambda frames: None if heard.done() else heard.set_result(frames))
        try:
            session.send(stream, "nbos_outputs_request", {"read": True})
            _, frames = session.feed_identities(await asyncio.wait_for(heard, PATIENCE))
            return list(session.deserialize(frames)["content"].get("cells", []))
        finally:
            stream.close()

    def _tell(self, kernel_id: str, content: dict[str, Any]) -> None:
        stream, session = self._stream(kernel_id)
        session.send(stream, "nbos_outputs_request", content)
        stream.close(linger=1000)

    def _stream(self, kernel_id: str) -> tuple[Any, Session]:
        km = self._kernels.get_kernel(kernel_id)
        return km.connect_control(), Session(config=km.session.config, key=km.session.key)


def place(notebook: NotebookNode, kept: dict[str, Any]) -> None:
    """Put what is kept of a cell below it. A cell that was never saved is added at the end, with the code that ran."""
    cells = notebook["cells"]
    found = next((cell for cell in cells if cell.get("id") == kept["cell"]), None)
    if found is not None and found["cell_type"] != "code":
        return
    if found is None:
        found = v4.new_code_cell(kept["code"], id=kept["cell"])
        cells.append(found)
    found["outputs"] = outputs(kept)
    found["execution_count"] = kept["count"]
    # Its user's own kernel has just made them: as trusted as if the page had received them.
    found["metadata"]["trusted"] = True


def outputs(kept: dict[str, Any]) -> list[Any]:
    """What a notebook file holds for a kept cell."""
    messages = [("stream", {"name": "stderr", "text": kept["note"]})] if kept["note"] else []
    messages += [(kind, content) for kind, content, *_ in kept["pieces"]]
    if not kept["ended"]:
        messages.append(("stream", {"name": "stderr", "text": RUNS}))
    made: list[Any] = []
    for kind, content in messages:
        try:
            output = v4.output_from_msg({"header": {"msg_type": kind}, "content": content})
        except (KeyError, ValueError):
            continue  # no output that a page could show either
        last = made[-1] if made else None
        if kind == "stream" and last is not None and last.get("name") == output["name"]:
            last["text"] += output["text"]
        else:
            made.append(output)
    return made


def file_before_reading() -> None:
    """Have the Contents API look for kept outputs before it reads a notebook."""
    if getattr(ContentsHandler.get, "nbos", False):
        return
    plain = ContentsHandler.get

    async def get(self: Any, path: str = "") -> None:
        filing = self.settings.get("nbos_filing")
        whole = self.get_query_argument("content", default="1") == "1"
        if filing is not None and self.current_user and whole and path.endswith(".ipynb"):
            await filing.before_reading(path)
        await plain(self, path)

    get.nbos = True  # type: ignore[attr-defined]
    ContentsHandler.get = get
