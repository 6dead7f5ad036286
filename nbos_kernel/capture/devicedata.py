"""Which values hold data of a device: whoever takes one apart for a capture, or puts one together again, notes it here.

Guarantee: what was pickled or loaded between two readings of `met()` on one thread holds nothing of a device when they
are the same.
"""

from __future__ import annotations

import threading

_here = threading.local()


def note() -> None:
    """A value of a device (a CUDA tensor wherever it lies, an allocation on a simulated one) is taken apart, or
    made."""
    _here.met = met() + 1


def met() -> int:
    """How many times this thread noted one."""
    return getattr(_here, "met", 0)
