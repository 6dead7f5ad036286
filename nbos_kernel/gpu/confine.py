"""Holding a cell's work on the GPU to the TPCs of its grant, by the mechanism that its host offers.

`green`: the slice's stream is torch's current one while the cell runs, on the thread that runs cells. What leaves it:
threads and streams of the user's own, graphs captured on another stream, the NULL stream, libraries that are not torch.
So it is cooperative towards hostile code, and said to be.
`percentage`: MPS caps how many SMs the process uses at a time, from CUDA's start in the process to its end.
`mig`: the device that was granted is no larger than the slice; nothing to do here.
`cooperative`: nothing holds the cell to its TPCs.

Where a mechanism cannot be used the cell runs all the same, cooperative, and `Held.reason` says why.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from .driver import Driver
from .errors import CudaTrouble
from .grants import COOPERATIVE, GREEN, PERCENTAGE, Share
from .slices import Slices

LIMIT = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PIPE = "CUDA_MPS_PIPE_DIRECTORY"
NO_PIPE = "/dev/null"
"""Without the variable CUDA takes any MPS daemon that it finds at the usual place, also one that it must not share."""


@dataclass(frozen=True)
class Held:
    """What a slice is held by, and to how many TPCs; tpcs 0: to no number. reason: why it is not what was granted."""

    mechanism: str
    tpcs: int = 0
    reason: str = ""


def percentage(shares: Sequence[Share]) -> int:
    """The MPS limit for these shares; 100: none. Rounded down: two halves of an odd number of TPCs must not overlap."""
    slices = [share for share in shares if not share.whole and share.mechanism == PERCENTAGE and share.of]
    return min((max(1, 100 * len(share.tpcs) // share.of) for share in slices), default=100)


class Confinement:
    """One a process. `open_driver` makes the driver when a slice wants it for the first time; `there` says whether a
    path exists."""

    def __init__(
        self, open_driver: Callable[[], Driver] = Driver, there: Callable[[str], bool] = os.path.exists
    ) -> None:
        self._open_driver, self._there = open_driver, there
        self._driver: Driver | None = None
        self._slices: dict[int, Slices] = {}
        self._started_with: tuple[int, str] | None = None
        """The MPS limit and pipe folder of CUDA's start in this process."""
        self._entered: tuple[Any, Any] | None = None
        """The slice's stream and the one that was current before."""
        self._on: frozenset[int] = frozenset()
        self._left: list[Any] = []
        """Streams of slices that this cell was on before: a `with torch.cuda.stream(…)` may put one back."""

    def prepare(self, environ: MutableMapping[str, str], shares: Sequence[Share]) -> None:
        """CUDA has not started in this process: set what it reads then."""
        limit = percentage(shares)
        # A container that was made before its host had MPS does not see the pipes: CUDA would start without a word.
        pipes = (share.mps for share in shares if share.mps and self._there(os.path.join(share.mps, "control")))
        environ[PIPE] = next(pipes, NO_PIPE)
        if limit < 100:
            environ[LIMIT] = str(limit)
        else:
            environ.pop(LIMIT, None)

    def started(self) -> None:
        """CUDA starts in this process now, with what stands in the environment."""
        self._started_with = (int(os.environ.get(LIMIT, "100")), os.environ.get(PIPE, ""))

    def enter(self, torch: Any, number: int, share: Share) -> Held:
        """Hold this thread's work on torch's device `number` to the share. Never raises for want of a mechanism."""
        if share.mechanism == PERCENTAGE:
            return self._capped(share)
        if share.whole:
            return Held(share.mechanism, len(share.tpcs))
        if share.mechanism != GREEN:
            return Held(share.mechanism, 0 if share.mechanism == COOPERATIVE else len(share.tpcs), share.why)
        limit, pipe = self._start()
        if pipe != share.mps or limit != 100:
            return Held(COOPERATIVE, reason=f"CUDA started in this process {_under(limit, pipe)}; restart the kernel")
        if threading.current_thread() is not threading.main_thread():
            return Held(COOPERATIVE, reason="CUDA was started by another thread than the cell's own")
        try:
            slice = self._slices_of(number).get(share.tpcs)
        except CudaTrouble as err:
            return Held(COOPERATIVE, reason=str(err))
        stream, before = torch.cuda.ExternalStream(slice.stream, device=number), torch.cuda.current_stream(number)
        # What comms or threads began between the cells is done before the cell's first kernel.
        stream.wait_stream(before)
        torch.cuda.set_stream(stream)
        self._entered, self._on = (stream, before), slice.tpcs
        short = len(share.tpcs) - len(slice.tpcs)
        reason = f"{len(share.tpcs)} TPCs were granted; the driver's groups leave {short} of them out" if short else ""
        return Held(GREEN, len(slice.tpcs), reason)

    def move(self, torch: Any, number: int, share: Share) -> Held:
        """The share's TPCs are others from now on. Everything that was launched before is over.

        A stream that the user chose stays the current one: it leaves the slice, as ever.
        """
        if self._entered is None:
            return self.enter(torch, number, share)
        (stream, before), self._entered = self._entered, None
        self._left.append(stream)
        current = torch.cuda.current_stream(number)
        torch.cuda.set_stream(before)
        held = self.enter(torch, number, share)
        if current not in self._left:
            torch.cuda.set_stream(current)
        return held

    def on(self, share: Share) -> frozenset[int]:
        """The TPCs of the share that work is launched on."""
        return frozenset(share.tpcs) if self._entered is None else self._on

    def leave(self, torch: Any) -> None:
        """The cell is over, and everything it launched on its device: put the stream of before back."""
        if self._entered is None:
            return
        (stream, before), self._entered = self._entered, None
        ours, self._left = [stream, *self._left], []
        # A stream that the user chose for good stays; it is theirs.
        if torch.cuda.current_stream(stream.device_index) in ours:
            torch.cuda.set_stream(before)

    def _capped(self, share: Share) -> Held:
        wanted, (has, pipe) = percentage([share]), self._start()
        if (has, pipe) == (wanted, share.mps):
            return Held(PERCENTAGE, len(share.tpcs))
        reason = (
            f"CUDA started in this process {_under(has, pipe)}, and keeps that; restart the kernel for the {wanted} % "
            "of this grant"
        )
        if has == 100 or pipe != share.mps:
            return Held(COOPERATIVE, reason=reason)
        return Held(PERCENTAGE, share.of * has // 100, reason)

    def _start(self) -> tuple[int, str]:
        if self._started_with is None:
            self.started()  # by a library that did not tell; what stands in the environment is the best guess
        assert self._started_with is not None
        return self._started_with

    def _slices_of(self, number: int) -> Slices:
        if self._driver is None:
            self._driver = self._open_driver()
        if number not in self._slices:
            self._slices[number] = Slices(self._driver, number)
        return self._slices[number]


def _under(limit: int, pipe: str) -> str:
    """How CUDA's start was, for people."""
    if pipe in ("", NO_PIPE):
        return "before this host's MPS daemon was there"
    return f"with {limit} % of the device's SMs" if limit < 100 else f"under the MPS daemon of {pipe}, without a limit"
