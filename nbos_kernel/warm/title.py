"""What `ps` shows of a process: Linux reads it from the process's own memory, where its arguments stand."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path

ROOM = "." * 512
"""An argument for whoever wants a longer title later; shorter titles show nothing of it."""

_ARG_START, _ARG_END = 48 - 3, 49 - 3  # proc_pid_stat(5), counted from the field after the name


def retitle(argv: Sequence[str]) -> None:
    """Show `argv` as this process's command line, as far as there is room; where that cannot be, nothing changes.

    The last byte of the area is not zero: so does Linux tell a title from arguments (fs/proc/base.c, get_mm_cmdline).
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        room = end - start
        text = " ".join(argv).encode()[: room - 2]
        if start and len(text) > 0:
            ctypes.memmove(start, text.ljust(room - 1, b"\0") + b".", room)
