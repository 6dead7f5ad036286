"""How much memory this host has left, told roughly and looked up rarely: it travels in the replicas' records.

Guarantees: read at most once in FRESH seconds, whoever asks; rounded down to STEP, so that it alone changes no record.
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil

FRESH = 1.0
STEP = 64 << 20


class HostMemory:
    def __init__(self) -> None:
        self._read = (-FRESH, 0)

    def available(self) -> int:
        """Bytes that processes can still take without others being swapped out or ended."""
        now = time.monotonic()
        if now - self._read[0] >= FRESH:
            self._read = now, psutil.virtual_memory().available // STEP * STEP
        return self._read[1]


host = HostMemory()


def private(pid: int) -> int:
    """Bytes that no other process shares with it; 0 when that cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private_", "Swap:")))


def resident(pid: int) -> int:
    """Bytes of memory that a process of this host has; 0 when it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
