"""`In`, `Out`, `_`, `_i…` and the execution count on a replica that did not run the cells itself.

IPython keeps them in four places (lists, hidden names, the display hook, the shell); they are rebuilt from the
log's sources and counts and from the replicated results `_<n>`. Nothing is written to IPython's sqlite history
here: the executor did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .capture.names import LATEST, result_number


class History:
    """`shell`: the IPython shell whose history is kept."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell

    def last(self) -> int:
        """The count of the last cell that had one."""
        return int(self._shell.execution_count) - 1

    def record(self, entry: Mapping[str, Any], whole: bool) -> None:
        """Take over the sources and the count of an entry or a whole state."""
        count = int(entry.get("execution_count") or 0)
        if whole or count < self.last():
            self._forget()
        for number, source in entry.get("history") or ():
            self._input(int(number), source)
        if entry.get("source"):
            self._input(count, entry["source"])
        self._shell.execution_count = max(count, 0) + 1

    def results(self, values: Mapping[str, Any], gone: Iterable[str]) -> None:
        """Put replicated results where IPython looks for them: `Out`, the display hook, its hidden names."""
        out, hidden, hook = self._shell.user_ns["_oh"], self._shell.user_ns_hidden, self._shell.displayhook
        for name in gone:
            number = result_number(name)
            if number is not None:
                out.pop(number, None)
                hidden.pop(name, None)
            elif name in LATEST:
                setattr(hook, name, "")
                self._shell.user_ns[name] = hidden[name] = ""
        for name, value in values.items():
            number = result_number(name)
            if number is not None:
                out[number] = value
            elif name in LATEST:
                setattr(hook, name, value)
            else:
                continue
            hidden[name] = value

    def _input(self, count: int, source: str) -> None:
        manager, shell = self._shell.history_manager, self._shell
        try:
            parsed = shell.transform_cell(source)
        except Exception:  # noqa: BLE001 - a cell that never parsed: IPython stores it as it came
            parsed = source
        for lines, text in ((manager.input_hist_raw, source), (manager.input_hist_parsed, parsed)):
            lines.extend("" for _ in range(count + 1 - len(lines)))
            lines[count] = text.rstrip("\n")
        manager._iii, manager._ii, manager._i = manager._ii, manager._i, manager._i00
        manager._i00 = source
        names = {"_i": manager._i, "_ii": manager._ii, "_iii": manager._iii, f"_i{count}": source}
        shell.push(names, interactive=False)

    def _forget(self) -> None:
        manager = self._shell.history_manager
        for name in [name for name in self._shell.user_ns if name[:2] == "_i" and name[2:].isdigit()]:
            self._shell.user_ns.pop(name)
            self._shell.user_ns_hidden.pop(name, None)
        manager.input_hist_raw[:] = [""]
        manager.input_hist_parsed[:] = [""]
