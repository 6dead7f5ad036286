"""What magics set in IPython itself (`%load_ext`, `%autoreload`, `%precision`, `%config`, …) on a replica that did not
run them: their lines are remembered, replicated like a variable called NAME, and run there again in their order.

Guarantees: a line is run again at most once per process; one that fails there is named with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from .capture.quiet import quiet

NAME = "%settings"
"""Stands for the lines among the variables of an entry."""

REPEATED = frozenset({"alias", "alias_magic", "autocall", "automagic", "autoreload", "aimport", "colors", "config"})
REPEATED |= frozenset({"load_ext", "pdb", "precision", "reload_ext", "unalias", "unload_ext", "xmode"})

Lines = tuple[tuple[str, str], ...]


class RecordingShell(InteractiveShell):
    """A shell that tells `settings` of the line magics that the user ran."""

    settings: Settings | None = None

    def run_line_magic(self, magic_name: str, line: str, _stack_depth: int = 1) -> Any:
        result = super().run_line_magic(magic_name, line, _stack_depth + 1)
        if self.settings is not None:
            self.settings.ran(magic_name, line)
        return result

    def replay_line_magic(self, magic_name: str, line: str) -> None:
        """Run a line that another replica ran."""
        super().run_line_magic(magic_name, line)


class Settings:
    """`shell`: the IPython shell that the lines are run in."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self.lines: Lines = ()

    def ran(self, magic: str, line: str) -> None:
        """The user ran this line magic, and it did not fail."""
        asks = magic == "config" and "=" not in line
        drawing = magic == "matplotlib" and line.strip() not in ("", "inline")
        sizing = magic == "nbos" and line.split()[:1] == ["rightsizing"]
        if (magic in REPEATED and not asks) or drawing or sizing:
            this = (magic, line)
            # Running the same line twice sets the same: only its last place counts.
            self.lines = (*(other for other in self.lines if other != this), this)

    def variable(self) -> Iterator[tuple[str, Any]]:
        if self.lines:
            yield NAME, self.lines

    def apply(self, lines: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Run what is new in `lines`; what failed, by its line, with the reason."""
        known, failed = self.lines, {}
        self.lines = tuple((magic, line) for magic, line in lines)
        for magic, line in self.lines:
            if (magic, line) in known:
                continue
            try:
                with quiet():
                    self._shell.replay_line_magic(magic, line)
            except BaseException as err:  # noqa: BLE001 - an extension may raise anything; the replica must go on
                failed[f"%{magic} {line}".strip()[:200]] = f"{type(err).__name__}: {err}"[:300]
        return failed
