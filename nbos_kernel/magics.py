"""What users type: `%nbos status`, `%nbos state`, `%nbos gpu`, `%%gpu …`, `%%cpu`.

`%%gpu` and `%%cpu` are read before the cell is run (`resources.py`), so their line is turned into a comment by
an input transformer, which keeps line numbers right and lets another cell magic follow. The registered magics
only ever see misuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.display import display

from . import binding, resources, sizing
from .gpu import shown
from .reports import stateview

Status = Callable[[], dict[str, Any]]
Survey = Callable[[], dict[str, Any]]


def strip_resource_line(lines: list[str]) -> list[str]:
    """Input transformer: make a valid `%%gpu`/`%%cpu` line a comment, or drop it where another cell magic
    follows."""
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None or not lines[first].lstrip().startswith(("%%gpu", "%%cpu")):
        return lines
    code = "".join(lines)
    if resources.blank_first_line(code) == code:
        return lines
    rest = lines[first + 1 :]
    if rest and rest[0].startswith("%%"):
        return rest
    return [*lines[:first], "# " + lines[first], *rest]


@magics_class
class NBOSMagics(Magics):
    """`status()` asks the daemon and this replica; `survey()` is what `stateview` makes of both and the namespace;
    `gpu()` the text of `%nbos gpu`."""

    def __init__(self, shell: Any, status: Status, survey: Survey, gpu: Callable[[], str]) -> None:
        super().__init__(shell)
        self._status, self._survey, self._gpu = status, survey, gpu

    @line_magic
    def nbos(self, line: str) -> dict[str, Any] | None:
        """%nbos status: the kernel's replicas, what they have applied, what cannot be replicated, and what is
        granted. %nbos gpu: what this kernel may use of the GPUs, what this cell holds and what holds it to that, what
        the latest cells got, and what is waited for. %nbos gpu release: move what this process has on them to host
        memory, until the next cell with a GPU. %nbos state [--json]: the variables by size, which share objects, what
        is replicated, pending or not, and what the last cell wrote; with --json as a dict. %nbos rightsizing [on|off]:
        whether cells of this notebook may get fewer TPCs than they ask for, where that was measured to cost little."""
        asked = line.split()
        if asked == ["state", "--json"]:
            return self._survey()
        if asked == ["state"]:
            state = self._survey()
            display({"text/plain": stateview.as_text(state), "text/html": stateview.as_html(state)}, raw=True)
        elif asked == ["gpu", "release"]:
            print(binding.release())
        elif asked == ["gpu"]:
            print(self._gpu())
        elif asked in ([], ["status"]):
            print(describe(self._status()))
        elif asked[0] == "rightsizing" and (said := sizing.switch(asked[1:])) is not None:
            print(said)
        else:
            known = "`status`, `gpu [release]`, `state [--json]` and `rightsizing [on|off]`"
            raise UsageError(f"%nbos knows {known}, not {line.strip()!r}")
        return None

    @cell_magic
    def gpu(self, line: str, cell: str) -> None:
        """%%gpu [number] [tpcs=N] [mem=SIZE] [model=NAME] [exact] [borrow=N|max|no]: run this cell with GPUs. Must be
        the cell's first line."""
        self._explain("gpu", line)

    @cell_magic
    def cpu(self, line: str, cell: str) -> None:
        """%%cpu: run this cell without a GPU, whatever the kernel's default is. Must be the cell's first line."""
        self._explain("cpu", line)

    def _explain(self, magic: str, line: str) -> None:
        try:
            resources.parse(magic, line)
        except resources.BadResources as err:
            raise UsageError(str(err)) from None
        raise UsageError(f"%%{magic} must be the first line of the cell")


def describe(status: dict[str, Any]) -> str:
    """The text of `%nbos status`."""
    where = f"replica {status['replica']} on {status['host']}"
    lines = [f"kernel {status['kernel']}   {where}   last committed: {status['last']}"]
    if status.get("error"):
        lines.append(f"  {status['error']}")
    for member in status["members"]:
        role = "executor" if member["index"] == status["executor"] else "standby"
        applied = f"applied {member.get('applied', '?')}"
        who = f"  replica {member['index']}  {member['host']:<16}"
        lines.append(f"{who} {member.get('state', ''):<9} {role:<9} {applied}")
    if binding.grant() is not None:
        lines += [f"  grant: {line}" for line in shown.lines(binding.grant(), binding.held())]
    for waiting in status.get("queue") or ():
        lines.append(f"  queue: {waiting}")
    if status["lost"]:
        lines.append("  not replicated (gone after a failover):")
        lines += [f"    {name}: {reason}" for name, reason in sorted(status["lost"].items())]
    else:
        lines.append("  every variable is replicated")
    return "\n".join(lines)
