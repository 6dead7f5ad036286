"""What users type: `%nbos status`, `%%gpu …`, `%%cpu`.

`%%gpu` and `%%cpu` are read before the cell is run (`resources.py`), so their line is turned into a comment by
an input transformer, which keeps line numbers right and lets another cell magic follow. The registered magics
only ever see misuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

from . import binding, resources
from .capture.changes import Capture

Status = Callable[[], dict[str, Any]]


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
    """`status()` asks the daemon and this replica; it raises ConnectionError while the daemon is away."""

    def __init__(self, shell: Any, status: Status, capture: Capture) -> None:
        super().__init__(shell)
        self._status, self._capture = status, capture

    @line_magic
    def nbos(self, line: str) -> None:
        """%nbos status: the kernel's replicas, what they have applied, what cannot be replicated, and what is
        granted. %nbos state: the variables by size, which share objects, and what the last cell wrote."""
        if line.strip() == "state":
            print(describe_state(self._capture.report(), self._capture.written))
            return
        if line.strip() not in ("", "status"):
            raise UsageError(f"%nbos knows `status` and `state`, not {line.strip()!r}")
        print(describe(self._status()))

    @cell_magic
    def gpu(self, line: str, cell: str) -> None:
        """%%gpu [number] [tpcs=N] [mem=SIZE] [model=NAME]: run this cell with GPUs. Must be the cell's first
        line."""
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


def size(count: float) -> str:
    """Bytes for people: 3.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def describe_state(rows: list[dict[str, Any]], written: dict[str, int]) -> str:
    """The text of `%nbos state`. Variables on one line share objects and are written together."""
    total = sum(row["size"] for row in rows)
    lines = [f"{size(total)} in {len(rows)} components (as of the last cell)"]
    for row in rows:
        names = ", ".join(row["names"])
        names = names if len(names) <= 60 else names[:57] + f"… ({len(row['names'])})"
        why = row["reason"]
        if row["state"] == "replicated" and why:
            why = f"examined after every cell: {why}"
        lines.append(f"  {size(row['size']):>10}  {row['state']:<14}  {names}" + (f"   ({why})" if why else ""))
    wrote = {names: count for names, count in written.items() if not names.startswith("%")}
    if wrote:
        lines.append(f"the last cell wrote {size(sum(wrote.values()))}: " + "; ".join(sorted(wrote))[:200])
    else:
        lines.append("the last cell wrote nothing")
    return "\n".join(lines)


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
    held = binding.grant()
    if held is not None:
        kind = "simulated " if held.simulated else ""
        lines.append(f"  grant: {held.tpcs} TPCs, {held.memory / 2**30:.1f} GiB on {kind}{', '.join(held.devices)}")
    for waiting in status.get("queue") or ():
        lines.append(f"  queue: {waiting}")
    if status["lost"]:
        lines.append("  not replicated (gone after a failover):")
        lines += [f"    {name}: {reason}" for name, reason in sorted(status["lost"].items())]
    else:
        lines.append("  every variable is replicated")
    return "\n".join(lines)
