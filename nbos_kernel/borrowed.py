"""The running cell on what is lent to it: `gpu.borrowing` with this process's hands, torch's and the simulated
GPU's."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

from . import binding
from .gpu.borrowing import Borrower
from .gpu.grants import Grant
from .pace import pace


class ProcessHands:
    def busy(self) -> bool:
        torch, played = binding.running_torch(), _simgpu()
        if played is not None and played.busy():
            return True
        return torch is not None and bool(torch.cuda.is_current_stream_capturing())

    def settle(self) -> None:
        played = _simgpu()
        if played is not None:
            played.settle()
        binding.settle()

    def tied(self) -> bool:
        torch = binding.running_torch()
        return torch is not None and graph_alive(torch)

    def on(self) -> frozenset[int]:
        return binding.on()

    def move(self, tpcs: frozenset[int], lent: int) -> None:
        binding.move(tpcs, lent)
        played = _simgpu()
        if played is not None:
            played.moved()


def graph_alive(torch: Any) -> bool:
    """Whether a CUDA tensor exists that backward could start from. Whoever calls backward has one, and tensors are
    objects that the garbage collector knows."""
    tensor = torch.Tensor
    return any(
        issubclass(type(one), tensor) and tensor.is_cuda.__get__(one) and tensor.grad_fn.__get__(one) is not None
        for one in gc.get_objects()
    )


def _simgpu() -> Any:
    """The module, where the user's code has imported it."""
    return sys.modules.get(f"{__package__}.simgpu")


class Loans:
    """What the executions of a process have to do with loans."""

    def __init__(self, say: Callable[[int, int], None]) -> None:
        self.borrower = Borrower(ProcessHands(), say)
        pace.boundary = self.borrower.boundary

    def begin(self, grant: Grant | None) -> None:
        """A cell leads, bound to its grant; or got it on its way. Only one slice can be lent to."""
        if grant is None or len(grant.shares) != 1 or grant.whole:
            self.borrower.begin_without()
            return
        (share,) = grant.shares
        self.borrower.begin(grant.id, grant.version, frozenset(share.tpcs), len(share.lent))
