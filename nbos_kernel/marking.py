"""`%%replay`, as the user types it: the line becomes a comment, so that the rest is a cell like any other.

It stands first in the cell, above or below a `%%gpu` or `%%cpu` line, and before any other cell magic. A line that
cannot be taken (too many cells, too long, in another place) is left standing: the magic of that name then says what is
wrong.
"""

from __future__ import annotations

import threading
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class

from .magics import strip_resource_line
from .replay import Records, line_of


def install(shell: Any, records: Records) -> None:
    """Teach `shell` NBOS's own first lines."""

    def strip(lines: list[str]) -> list[str]:
        return strip_resource_line(strip_replay_line(strip_resource_line(lines), records))

    shell.input_transformers_cleanup.insert(0, strip)
    shell.register_magics(ReplayMagics(shell, records))


def strip_replay_line(lines: list[str], records: Records) -> list[str]:
    """Make a valid `%%replay` line a comment, or drop it where another cell magic follows."""
    number = line_of(lines)
    if number is None or _in_subshell() or records.why_not("".join(lines[number + 1 :])):
        return lines
    rest = lines[number + 1 :]
    if rest and rest[0].startswith("%%"):
        return rest
    return [*lines[:number], "# " + lines[number], *rest]


def _in_subshell() -> bool:
    return threading.current_thread() is not threading.main_thread()


@magics_class
class ReplayMagics(Magics):
    """Only ever sees misuse."""

    def __init__(self, shell: Any, records: Records) -> None:
        super().__init__(shell)
        self._records = records

    @cell_magic
    def replay(self, line: str, cell: str) -> None:
        """%%replay: run this cell again after a failover, when variables that it makes could not be replicated. Must
        be the cell's first line."""
        if line.strip():
            raise UsageError(f"%%replay takes no arguments, got {line.strip()!r}")
        if _in_subshell():
            raise UsageError("%%replay does not work in a subshell; run it as a cell of the notebook itself")
        raise UsageError(self._records.why_not(cell) or "%%replay must be the first line of the cell")
