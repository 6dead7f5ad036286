"""What is lent to the running cell comes and goes: this process follows its daemon, and says when it is off a TPC.

The daemon tells which TPCs the cell should be on (`told`, on the link's thread). It moves there at the end of a step,
on the thread that runs cells. No step within the time that it was given: a signal has that thread look between two
lines of Python; then it moves if that is safe, and after twice the time stops where it stands, if it has something to
give back. Guarantees:
- `say` comes after everything that was launched before is over, and nothing is launched elsewhere from then on by that
  thread on torch's current stream (what leaves the stream leaves the slice, as ever).
- It never moves between two lines while an autograd graph is alive: backward runs on the streams of the forward pass,
  and torch's allocator orders what it gives out within a stream only. A cell that stopped there goes on once it has the
  TPCs that it stood on, or the graph is gone.
- A stopped cell can be interrupted. A long call of C is waited for, whatever it does: that is the bound.

The signal handler takes no lock and writes to no socket: it may have interrupted who holds it.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

SIGNAL = signal.SIGRTMIN + 11
AGAIN = 0.1
"""Seconds until the thread is asked to look again."""


class Hands(Protocol):
    """What moves the process's work; all of it is called on the thread that runs cells."""

    def busy(self) -> bool:
        """Whether the device must not be touched at this line (a graph is being captured)."""

    def settle(self) -> None:
        """Wait until everything that was launched is over."""

    def tied(self) -> bool:
        """Whether work to come belongs to the stream of before: an autograd graph is alive."""

    def on(self) -> frozenset[int]:
        """The TPCs of the slice that work is launched on."""

    def move(self, tpcs: frozenset[int], lent: int) -> None:
        """From now on work is launched on these."""


@dataclass(frozen=True)
class Told:
    """n: the execution. lent: how many of `tpcs` are on loan. within: seconds to the end of a step. at: when it
    came."""

    grant: str
    n: int
    version: int
    tpcs: frozenset[int]
    lent: int
    within: float
    at: float


@dataclass(frozen=True)
class Moved:
    """seconds: since the cell began. took: from being told to being there."""

    seconds: float
    before: int
    after: int
    took: float


class Borrower:
    """One a process. say: tells the daemon that execution n is on the slice of that version; called on a thread of its
    own, which is started when something is told for the first time."""

    def __init__(self, hands: Hands, say: Callable[[int, int], None]) -> None:
        self._hands, self._say = hands, say
        self._grant, self._version, self._began = "", 0, 0.0
        self._tpcs: frozenset[int] = frozenset()
        self._told: Told | None = None
        self._looking = self._stopped = False
        self._news = threading.Event()
        self._inbox: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.moves: list[Moved] = []
        self.most_lent = 0

    # -- the link's thread --------------------------------------------------------------------------------------------

    def told(self, message: Mapping[str, Any]) -> None:
        """The daemon says what the cell should be on."""
        self._told = Told(
            grant=str(message["grant"]),
            n=int(message["n"]),
            version=int(message["version"]),
            tpcs=frozenset(message["tpcs"]),
            lent=int(message["lent"]),
            within=float(message["within"]),
            at=time.monotonic(),
        )
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="NBOS loans", daemon=True)
            self._thread.start()
        self._news.set()
        self._inbox.put(None)

    # -- the thread that runs cells -----------------------------------------------------------------------------------

    def begin(self, grant: str, version: int, tpcs: frozenset[int], lent: int) -> None:
        """A cell with a slice begins. Nothing runs yet: what was told already holds from its first line."""
        signal.signal(SIGNAL, self._on_signal)
        self._grant, self._version, self._tpcs = grant, version, tpcs
        self.moves, self.most_lent, self._began = [], lent, time.monotonic()
        self._stopped = False
        self.boundary()

    def begin_without(self) -> None:
        """A cell begins to which nothing can be lent: what is known of the one before is not its own."""
        self.moves, self.most_lent = [], 0

    def end(self) -> None:
        """The cell is over: what is told of its grant from now on means nothing."""
        self._grant, self._stopped = "", False

    def boundary(self) -> None:
        """The end of a step."""
        if self._wanted() is not None:
            self._look(at_step=True)

    @property
    def changed(self) -> bool:
        return bool(self.moves)

    def _on_signal(self, *_: object) -> None:
        self._look(at_step=False)

    def _wanted(self) -> Told | None:
        """What the cell was told and does not do yet."""
        told = self._told
        if told is None or told.grant != self._grant or (told.version <= self._version and not self._stopped):
            return None
        return told

    def _look(self, at_step: bool) -> None:
        if self._looking:
            return
        self._looking = True
        try:
            while (told := self._wanted()) is not None:
                self._news.clear()
                if told is not self._told:
                    continue
                if self._hands.busy() or not self._follow(told, at_step):
                    return
                if self._stopped:
                    self._news.wait()
        finally:
            self._looking = False

    def _follow(self, told: Told, at_step: bool) -> bool:
        """False: it cannot be done at this line; a later one is looked at."""
        if self._stopped and told.version == self._version:
            return True
        free = at_step or not self._hands.tied()
        if told.tpcs and free:
            self._hands.settle()
            if told is self._told:
                self._hands.move(told.tpcs, told.lent)
                self._arrived(told, stopped=False)
            return True
        if told.tpcs and self._hands.on() <= told.tpcs:
            # Tied to what it is on, and that is its own: it goes on there, and grows at the end of the step.
            if self._stopped or not self._tpcs <= told.tpcs:
                self._arrived(told, stopped=False)
                return True
            return False
        if free or time.monotonic() >= told.at + 2 * told.within:
            self._hands.settle()
            if told is self._told:
                self._arrived(told, stopped=True)
            return True
        return False

    def _arrived(self, told: Told, stopped: bool) -> None:
        now = time.monotonic()
        if told.tpcs != self._tpcs:
            self.moves.append(Moved(now - self._began, len(self._tpcs), len(told.tpcs), now - told.at))
        self._tpcs, self._version, self._stopped = told.tpcs, told.version, stopped
        self.most_lent = max(self.most_lent, told.lent)
        self._inbox.put((told.n, told.version))

    # -- its own thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                item = self._inbox.get(timeout=self._until())
            except queue.Empty:
                item = None
            if item is not None:
                self._say(*item)
            told = self._wanted()
            if told is not None and not self._looking and time.monotonic() >= told.at + told.within:
                signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)

    def _until(self) -> float | None:
        """Seconds until the thread that runs cells must be asked to look."""
        told = self._wanted()
        return max(AGAIN, told.at + told.within - time.monotonic()) if told is not None else None
