"""A running cell asks for its grant when it first uses a GPU: the request, the wait, and binding what comes.

Guarantees: it is asked for under the cell's claim, and what is granted is bound once, before the code that touched goes
on; an interrupt while it waits leaves the queue and raises KeyboardInterrupt there; a cell that is over gets nothing
more: what comes too late is given back. Where it stands in the queue is shown while the main thread is held up.

Threads: any may touch (`gpu.gate` lets one ask at a time); `begin` and `end` belong to the main thread, `waiting` to
the link's.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nbos_cluster import wire

from . import binding, resources
from .foresight import Needs
from .gpu import leftovers
from .gpu.gate import gate
from .link import DaemonAway, Link

Message = dict[str, Any]

LOOK = 0.5
"""Seconds between two looks whether the cell is still there, for threads that no signal reaches."""


class NoGPU(RuntimeError):
    """The cell used a GPU and can get none; says why, and the way out."""


class Cell(Protocol):
    """The execution that runs: as `execution.Running`."""

    n: int
    token: int
    granted: bool


Granted = Callable[[binding.Grant, float], None]
"""A grant came, after so many seconds in the host's queue; before it is bound."""


@dataclass
class _Open:
    cell: Cell
    needs: Needs
    granted: Granted
    asked: bool = False
    waits: bool = False
    """Its place in the queue was shown."""


class Touching:
    """`publish(content)` says on iopub, for the router, how a cell's wait stands; called on any thread. bound: called
    on the main thread, when a grant that it asked for is bound."""

    def __init__(
        self,
        link: Link,
        publish: Callable[[Message], None],
        tell: Callable[[str], None],
        bound: Callable[[binding.Grant], None],
    ) -> None:
        self._link, self._publish, self._tell, self._bound = link, publish, tell, bound
        self._lock = threading.RLock()
        self._open: _Open | None = None

    def begin(self, cell: Cell, needs: Needs, may: Mapping[str, Any], granted: Granted) -> None:
        """A cell begins without a grant. may: what the daemon said it may get (devices, real)."""
        self._open = _Open(cell, needs, granted)
        gate.arm(self._ask, int(may.get("devices", 0)), bool(may.get("real")))

    def end(self) -> bool:
        """The cell's code is over. Whether something may have to be given back, or a request to be ended, though the
        cell was not granted anything in time."""
        gate.disarm()
        with self._lock:  # a thread that binds a grant just now comes to its end first
            now, self._open = self._open, None
        if now is not None and not now.cell.granted:
            self._left(now)
        return now is not None and now.asked

    def waiting(self, message: Message) -> bool:
        """The daemon says where an execution stands in its queue: whether it was this one's."""
        now = self._open
        if now is None or not now.asked or message.get("n") != now.cell.n:
            return False
        now.waits = True
        self._publish({"state": "waiting", **{key: value for key, value in message.items() if key != "type"}})
        return True

    def _ask(self, why: str) -> None:
        """Called by the gate: on the thread that touches."""
        now = self._open
        if now is None:
            return
        now.asked = True
        try:
            reply = self._reply(now, self._request(now))
        except BaseException:
            self._leave(now)
            raise
        with self._lock:
            if self._open is not now:
                raise NoGPU("the cell is over, and its GPU with it")
            self._bind(now, reply)

    def _request(self, now: _Open) -> Any:
        cell, needs = now.cell, now.needs
        ask = {"type": "touch", "n": cell.n, "token": cell.token, "resources": needs.later, "code": needs.code}
        if needs.borrow is not None:
            # What is lent comes and goes on the thread that runs cells: work of another one could not be moved.
            ask["borrow"] = needs.borrow if _on_main_thread() else resources.NOTHING
        if away := leftovers.away():
            ask["away"] = away
        return self._link.request(ask)

    def _reply(self, now: _Open, request: Any) -> Message:
        """Wait for it. Raises NoGPU, and KeyboardInterrupt on the main thread."""
        while True:
            try:
                message, _ = request.future.result(timeout=LOOK)
            except concurrent.futures.TimeoutError:
                if self._open is not now:
                    raise NoGPU("the cell is over; it waits for a GPU no longer") from None
                continue
            except (DaemonAway, wire.WireError) as err:
                raise NoGPU(str(err)) from None
            if message.get("error") == "fenced" and request.message["token"] != now.cell.token:
                request = self._request(now)  # the claim was renewed meanwhile, more than once
            elif not message.get("ok", False):
                reason = str(message.get("reason") or message.get("error") or "refused")
                raise NoGPU(f"this cell used a GPU and gets none: {reason}. {_way_out(str(message.get('error')))}")
            else:
                return dict(message)

    def _leave(self, now: _Open) -> None:
        self._link.tell({"type": "cancel", "n": now.cell.n})
        self._left(now)

    def _left(self, now: _Open) -> None:
        if now.waits:
            now.waits = False
            self._publish({"state": "left", "n": now.cell.n})

    def _bind(self, now: _Open, reply: Message) -> None:
        granted, waited = binding.from_wire(reply.get("grant")), float(reply.get("waited") or 0.0)
        if granted is None:
            raise NoGPU("the daemon gave no GPU for this cell's request")
        now.cell.granted = True
        now.granted(granted, waited)
        self._publish({"state": "granted", "n": now.cell.n, "grant": reply.get("grant"), "at": time.time()})
        notice = binding.bind(granted)
        if notice:
            self._tell(notice)
        if _on_main_thread():
            self._bound(granted)


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _way_out(code: str) -> str:
    if code == "impossible":
        return "Begin the cell with %%gpu to have it run on a host that has what it needs, or with %%cpu to use none"
    return "Run it again"
