"""A client that writes down what it did and was told, and a checker that compares it with the namespace and the log.

What is checked, for one kernel: each cell that was answered `ok`, or with an error of its own, ran exactly once in the
namespace that survived, one that NBOS answered with an error not at all (once at most when it said that the reply was
lost). A cell whose replica was lost between its reply and the storing of its changes did not run at all, if the next
cell says so. Effects stand in the order in which cells were sent; the log in etcd holds exactly one execution for each
answered cell, under the number of its reply; nothing ran that nobody sent.
"""

from __future__ import annotations

import ast
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd, TLSFiles
from nbos_cluster.records import Checkpoint, LogEntry
from tests.system.channels import Cell, Result
from tests.system.cluster import Notebook


@dataclass
class Sent:
    """One numbered cell."""

    number: int
    cell: Cell
    result: Result | None = None

    async def done(self, timeout: float = 60.0) -> Result:
        self.result = await self.cell.result(timeout)
        return self.result


@dataclass
class History:
    """The numbered cells of one notebook. name: in every cell, so that those of an earlier history are told apart."""

    notebook: Notebook
    name: str = field(default_factory=lambda: secrets.token_hex(4))
    sent: list[Sent] = field(default_factory=list)
    log: dict[tuple[int, str], None] = field(default_factory=dict)
    """What was seen of the log: the checkpoint keeps the latest cells only."""

    async def begin(self) -> History:
        await self.notebook.run("import time, socket; ran = []; total = 0")
        return self

    async def submit(self, before: str = "", after: str = "") -> Sent:
        """A cell whose effect is its number in `ran`; its effect on `total` must not come apart from that."""
        number = len(self.sent) + 1
        lines = [before, f"ran.append({number}); total += {number}  # {self.name}", after]
        cell = await self.notebook.channels.submit("\n".join(line for line in lines if line))
        self.sent.append(Sent(number, cell))
        return self.sent[-1]

    async def run(self, before: str = "", after: str = "", timeout: float = 60.0) -> Result:
        return await (await self.submit(before, after)).done(timeout)

    async def look(self, etcd: list[str], admin: TLSFiles) -> None:
        """Note what stands in the log; to be called every few hundred cells."""
        # A member that was cut off a moment ago may answer late.
        async with Etcd(etcd, admin, timeout=30) as client:
            self.log.update(dict.fromkeys(await cells_of(client, self.notebook.kernel)))

    async def check(self, etcd: list[str], admin: TLSFiles) -> None:
        """All that was written down against the namespace and the log."""
        ran, total = ast.literal_eval(await self.notebook.run("print((ran, total))", 60))  # a value of 1,000 is cut
        await self.look(etcd, admin)
        if found := problems(self.sent, ran, total, list(self.log)):
            raise AssertionError(f"kernel {self.notebook.kernel}:\n" + "\n".join(found))


def problems(sent: list[Sent], ran: list[int], total: int, log: list[tuple[int, str]]) -> list[str]:
    """What is wrong with a history, in words. log: execution count and source of every cell that is in the log."""
    found = []
    for one, following in zip(sent, [*sent[1:], None], strict=True):
        times, result = ran.count(one.number), one.result
        if result is None:
            found.append(f"cell {one.number} was never answered")
            continue
        name = str(result.reply.get("ename", ""))
        # An error of the user's own code comes after the effect, which stays; one of ours says that there was none, or
        # (its reply was lost with its host) that it may have run.
        happened = times == 1 if name == "NBOSReplyLost" else not name.startswith("NBOS")
        happened = happened and not undone(following)
        if times != int(happened):
            found.append(f"cell {one.number} was answered {result.status} {result.error} and ran {times} times")
        if result.states != ["busy", "idle"]:
            found.append(f"cell {one.number} was told as {result.states}")
        counts = [count for count, source in log if source.strip() == (one.cell.code or "").strip()]
        count = result.reply.get("execution_count")
        if happened and counts != [count] and (name != "NBOSReplyLost" or len(counts) != 1):
            found.append(f"cell {one.number} was answered as {count}; in the log: {counts}")
    if ran != sorted(ran):
        found.append(f"cells ran in the order {ran}")
    if total != sum(ran):
        found.append(f"torn state: total is {total}, the cells that ran give {sum(ran)}")
    if foreign := set(ran) - {one.number for one in sent}:
        found.append(f"nobody sent the cells {sorted(foreign)}")
    return found


UNDONE = "before the changes of the previous cell were stored"


def undone(following: Sent | None) -> bool:
    """Whether the user was told, with the next cell, that nothing is left of this one."""
    return following is not None and following.result is not None and UNDONE in following.result.stderr


async def cells_of(client: Etcd, kernel: str) -> list[tuple[int, str]]:
    """Execution count and source of all cells that the log holds, the folded ones, too."""
    kvs, _ = await client.range(keys.kernel(kernel))
    cells: list[tuple[int, str]] = []
    entries: list[LogEntry] = []
    upto = 0
    for kv in kvs:
        if kv.key == keys.checkpoint(kernel):
            checkpoint = records.decode(kv.value, Checkpoint)
            upto, cells = checkpoint.upto, list(checkpoint.history)
        elif kv.key.startswith(keys.log(kernel)):
            entries.append(records.decode(kv.value, LogEntry))
    return cells + [(e.execution_count, e.source) for e in entries if e.n > upto and e.kind == "cell"]


def admin_files(folder: Path) -> TLSFiles:
    return TLSFiles(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
