"""The grant's memory as torch's own limit: what torch allocates in this process stays below it.

It bounds torch's caching allocator, not CUDA: the context (about 0.5 GB) and what other libraries allocate come on top,
which the daemon's watchdog looks at (docs/slices.md).
"""

from __future__ import annotations

import contextlib
from typing import Any

from .grants import Grant, Share

GIB = 1 << 30


def bind(torch: Any, number: int, share: Share) -> None:
    """Torch's device `number` gives no more than the share's memory."""
    total = torch.cuda.get_device_properties(number).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share.memory / total) if share.memory else 1.0, number)
    _count_anew(torch, number)


def peak(torch: Any, number: int) -> int:
    """Bytes that torch had on its device `number` at most, since `bind`; 0 where that is not counted."""
    try:
        return int(torch.cuda.max_memory_allocated(number))
    except (AttributeError, RuntimeError):  # an allocator of the user's own keeps no count
        return 0


def _count_anew(torch: Any, number: int) -> None:
    with contextlib.suppress(AttributeError, RuntimeError):  # as above
        torch.cuda.reset_peak_memory_stats(number)


def lift(torch: Any, number: int) -> None:
    """The cell is over: what it left is the daemon's business, and copying it away may need room for a moment."""
    torch.cuda.set_per_process_memory_fraction(1.0, number)


def explain(error: BaseException | None, grant: Grant | None) -> None:
    """Tell a cell that ran out of device memory what its budget is, and how to get a larger one."""
    if error is None or grant is None or type(error).__name__ != "OutOfMemoryError":
        return
    if not type(error).__module__.startswith("torch"):
        return
    budgets = ", ".join(f"{share.memory / GIB:.1f} GiB on {share.model or share.uuid}" for share in grant.shares)
    error.add_note(
        f"NBOS: this cell's memory budget is {budgets}, what earlier cells left on the device included. Ask for more "
        "in the cell's first line (`%%gpu 1` for a whole device, `%%gpu tpcs=N mem=SIZE` for a slice), or free some: "
        "`del` what is not needed, then torch.cuda.empty_cache()."
    )
