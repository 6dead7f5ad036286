"""What a user feels when the process that holds the variables is killed (kill -9): NBOS beside plain
Jupyter.

Between cells: the next cell, sent at once, reads a variable; counted until its reply, and the same for the cell after
that one, which waits for what another replica has to look at first. With `--namespace` the kernel holds so many bytes
besides. During a cell: counted until the first word in that cell's output (or its error) after the kill. Plain Jupyter
loses the variables; its column shows how long its user waits until the kernel answers again, and when anything at all
is said.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import time
from dataclasses import dataclass, field

from measure import Running, Table, nbos_hub, stock_hub

from tests.system.channels import Channels, ConnectionLost
from tests.system.hubclient import Server, eventually
from tests.system.nbosenv import settled

PID = "import os; os.getpid()"
LONG = "import os, time\nprint('begun', os.getpid(), 'now', flush=True)\ntime.sleep(600)"
PATIENCE = 15.0
MAKE = "import numpy; parts = [numpy.random.default_rng(i).bytes({part}) for i in range({count})]"
PART = 64 << 20


@dataclass
class Felt:
    between: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    kept: int = 0
    during: list[float] = field(default_factory=list)
    words: set[str] = field(default_factory=set)


async def kill_between(side: Running, channels: Channels, kernel: str, number: int, felt: Felt) -> None:
    pid = await prepared(side, channels, kernel, number)
    os.kill(pid, signal.SIGKILL)
    began = time.perf_counter()
    value = await next_value(channels)
    felt.between.append(time.perf_counter() - began)
    felt.kept += value == str(number)
    began = time.perf_counter()
    await next_value(channels)
    felt.second.append(time.perf_counter() - began)


async def next_value(channels: Channels) -> str:
    """The value of `kept`, asked again when a plain kernel swallowed the question with its death."""
    deadline = time.perf_counter() + PATIENCE
    while True:
        try:
            return (await channels.execute("kept", timeout=2.0)).value
        except (TimeoutError, ConnectionLost):
            if time.perf_counter() > deadline:
                return ""


async def kill_during(side: Running, channels: Channels, kernel: str, number: int, felt: Felt) -> None:
    await prepared(side, channels, kernel, number)
    cell = await channels.submit(LONG)
    await cell.text("now")
    pid = int(cell.written().split()[1])  # of the replica that runs this very cell
    seen, said = len(cell.messages), len(channels.unclaimed)
    before = cell.written()
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)

    async def told() -> str | None:
        if cell.reply is not None or len(cell.messages) > seen:
            return cell.written().removeprefix(before).strip() or str(cell.reply and cell.reply.content)
        restarts = [m for m in channels.unclaimed[said:] if m.content.get("execution_state") == "restarting"]
        return "(not in the cell: the kernel's status says 'restarting')" if restarts else None

    try:
        words = await eventually(told, "a word about the killed cell", PATIENCE, every=0.01)
    except TimeoutError:
        words = f"(nothing within {PATIENCE:g} s)"
    felt.during.append(time.perf_counter() - began)
    felt.words.add(words.splitlines()[-1][:160])
    if cell.reply is None and side.name == "NBOS":
        await cell.result(PATIENCE)


async def prepared(side: Running, channels: Channels, kernel: str, number: int) -> int:
    """A kernel at rest that holds `kept`; the process id of the replica that ran the last cell."""
    await next_value(channels)
    pid = await _asked_until_answered(channels, f"kept = {number}\n{PID}")
    if side.name == "NBOS":
        await settled(side.hub, kernel)
    return pid


async def _asked_until_answered(channels: Channels, code: str) -> int:
    """The value of `code`; a plain kernel that is just being started again swallows what it is asked."""
    deadline = time.perf_counter() + 4 * PATIENCE
    while True:
        try:
            return int((await channels.execute(code, timeout=PATIENCE)).value)
        except (TimeoutError, ValueError):
            if time.perf_counter() > deadline:
                raise


async def measure(side: Running, rounds: int, size: int) -> Felt:
    felt = Felt()
    server: Server = await side.server("failover")
    kernel = await side.start_kernel(server)
    channels = await server.open(kernel)
    if size:
        await channels.execute(MAKE.format(part=min(size, PART), count=max(1, size // PART)), 300.0)
        if side.name == "NBOS":
            await settled(side.hub, kernel, 300)
    for number in range(rounds):
        await kill_between(side, channels, kernel, number, felt)
    for number in range(rounds):
        await kill_during(side, channels, kernel, number, felt)
    await channels.close()  # the kernel ends with its hub: deleting a plain one in its automatic restart is refused
    return felt


def report(plain: Felt, nbos: Felt) -> str:
    table = Table("The kernel's process is killed, seconds", ("what", "", "plain", "NBOS", "bar"))
    for name, of in (("median", statistics.median), ("worst", max)):
        between = (of(plain.between), of(nbos.between))
        during = (of(plain.during), of(nbos.during))
        table.add("between cells: next reply", name, f"{between[0]:.2f}", f"{between[1]:.2f}", "≤ 1 s")
        second = (of(plain.second), of(nbos.second))
        table.add("the cell after that one", name, f"{second[0]:.2f}", f"{second[1]:.2f}", "")
        table.add("during a cell: user told", name, f"{during[0]:.2f}", f"{during[1]:.2f}", "≤ 2 s")
    rounds = len(nbos.between)
    table.add("variable still there", "", f"{plain.kept}/{rounds}", f"{nbos.kept}/{rounds}", f"{rounds}/{rounds}")
    words = [f"{name} said: {word}" for name, felt in (("plain", plain), ("NBOS", nbos)) for word in felt.words]
    return "\n".join([table.render(), "", *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--namespace", type=int, default=0, help="bytes that the kernel holds besides (0)")
    options = parser.parse_args()
    with nbos_hub() as hub:
        nbos = asyncio.run(measure(hub, options.rounds, options.namespace))
    with stock_hub() as hub:
        plain = asyncio.run(measure(hub, options.rounds, options.namespace))
    print(report(plain, nbos))


if __name__ == "__main__":
    main()
