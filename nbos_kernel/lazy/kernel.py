"""ipykernel's requests on a replica that left large values in the store (`lazy.py`): what they look at is loaded first.

Guarantees: a cell whose values cannot be loaded now does not run at all, and its error says why and what to do, so
that `except NameError` in it never takes a value for missing that is only not there yet; interrupting works while
values are loaded; completion and inspection load only what is quickly there.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from ipykernel.ipkernel import IPythonKernel
from IPython.utils.tokenutil import token_at_cursor

from ..blobchannel import BlobChannel, BlobFailed, Target
from ..link import DaemonAway
from ..replica import Replica
from . import shell as lazyshell
from .loading import BlobMissing, NotLoadedError

Message = dict[str, Any]

PERMANENT = ("missing", "corrupt", "refused")
"""The daemon's answers that asking again does not change."""


class LoadingKernel(IPythonKernel):
    """Part of the kernel of a replica."""

    replica: Replica
    blobs: BlobChannel

    def load_before_callbacks(self) -> None:
        """Called once, when the kernel is made."""
        for kind in ("comm_open", "comm_msg", "comm_close"):
            self.shell_handlers[kind] = self._loading_first(self.shell_handlers[kind])

    async def read_now(self, hashes: Sequence[str], target: Target, chunk: int) -> int:
        """Never waits for the event loop: for what is loaded while a cell runs."""
        try:
            return self.blobs.read_now(hashes, target, chunk)
        except BlobFailed as err:
            raise BlobMissing(f"its data: {err}", again=err.code not in PERMANENT) from err
        except DaemonAway as err:
            raise BlobMissing(str(err), again=True) from err

    def not_loaded(self, code: str, *args: Any, user_expressions: Any = None, **kwargs: Any) -> Message | None:
        """Load what the code of an execute_request can look up. When that fails it does not run: this is its reply."""
        try:
            self.replica.lazy.before(code, map(str, (user_expressions or {}).values()))
        except (NotLoadedError, KeyboardInterrupt) as err:
            name, text = type(err).__name__, str(err) or "while the values that the cell names were loaded"
            shown = [f"{name}: {text}"]
            self.shell._showtraceback(type(err), text, shown)
            reply = {"status": "error", "ename": name, "evalue": text, "traceback": shown, "payload": []}
            return reply | {"execution_count": self.replica.history.last(), "user_expressions": {}}
        return None

    def do_complete(self, code: str, cursor_pos: int | None) -> Message:
        cursor = len(code) if cursor_pos is None else cursor_pos
        lazy = self.replica.lazy
        lazy.peek(code[:cursor].rpartition("\n")[2])
        return lazyshell.completed(super().do_complete(code, cursor), code, cursor, lazy)

    def do_inspect(self, code: str, cursor_pos: int, *args: Any, **kwargs: Any) -> Message:
        lazy = self.replica.lazy
        name = token_at_cursor(code, cursor_pos)
        if lazy.table and not lazy.peek(name):
            there = lazyshell.not_inspected(name, lazy)
            if there is not None:
                return there
        reply: Message = super().do_inspect(code, cursor_pos, *args, **kwargs)
        return reply

    def _loading_first(self, handler: Any) -> Any:
        """Callbacks of comms run outside of cells: what they can look up is loaded before."""

        async def handle(stream: Any, ident: Any, parent: Message) -> None:
            self.replica.capture.before_other_code()
            try:
                self.replica.lazy.before_callback()
            except NotLoadedError as err:
                self.log.warning("NBOS: a callback runs without what it may need: %s", err)
            handled = handler(stream, ident, parent)
            if inspect.isawaitable(handled):
                await handled

        return handle
