"""A replica of a kernel with a large namespace moves to another host while cells run without a pause.

Told: the time from the request until the old replica is gone and the new one, caught up, is in its place; and the
longest a cell took meanwhile, beside what cells of this very kernel take when nothing moves, in the same run. A cell's
wait for the move is what it took longer than such a cell usually does (their median).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass, field

from measure import Running, Table, nbos_hub, percentile

from tests.system.channels import Channels
from tests.system.hubclient import eventually
from tests.system.nbosenv import executor, model, settled

MAKE = "import numpy; parts = [numpy.random.default_rng(i).bytes({part}) for i in range({count})]; n = 0"
PART = 64 << 20
CELL = "n += 1; n"
BAR_MOVE, BAR_WAIT = 15.0, 0.2


@dataclass
class Round:
    took: float
    usual: list[float]
    meanwhile: list[float]


@dataclass
class Client:
    """Runs cells one after the other and remembers how long each took."""

    channels: Channels
    pause: float
    took: list[float] = field(default_factory=list)
    stop: bool = False

    async def run(self) -> None:
        while not self.stop:
            began = time.perf_counter()
            result = await self.channels.execute(CELL, 60.0)
            if result.status != "ok":
                raise SystemExit(f"a cell failed: {result.error}")
            self.took.append(time.perf_counter() - began)
            await asyncio.sleep(self.pause)


async def one_round(side: Running, kernel: str, channels: Channels, seconds: float, pause: float, lead: bool) -> Round:
    """lead: the replica that runs the cells moves, else a standby."""
    await settled(side.hub, kernel, 120)
    usual = Client(channels, pause)
    task = asyncio.create_task(usual.run())
    await asyncio.sleep(seconds)
    usual.stop = True
    await task
    client = Client(channels, pause)
    task = asyncio.create_task(client.run())
    leads = await executor(side.hub, kernel)
    members = (await model(side.hub, kernel))["members"]
    source = next(m["host"] for m in members if (m["index"] == leads.index) == lead)
    began = time.perf_counter()
    await side.hub.service("POST", f"nbos/api/kernels/{kernel}/move", {"from": source})

    async def over() -> bool:
        return (await model(side.hub, kernel))["move"] is None

    await eventually(over, "the replica has moved", 120, every=0.1)
    took = time.perf_counter() - began
    client.stop = True
    await task
    moved = (await model(side.hub, kernel))["moved"]
    if moved["phase"] != "done":
        raise SystemExit(f"it was not moved: {moved['reason']}")
    return Round(took, usual.took, client.took)


async def measure(side: Running, size: int, rounds: int, seconds: float, pause: float) -> dict[str, list[Round]]:
    server = await side.server("migrate")
    kernel = await side.start_kernel(server)
    channels = await server.open(kernel)
    await channels.execute(MAKE.format(part=PART, count=max(1, size // PART)), 300.0)
    await channels.execute(CELL, 300.0)  # after this one's lead, the entry with the namespace is in the log
    await settled(side.hub, kernel, 300)
    found: dict[str, list[Round]] = {"a standby": [], "the executor": []}
    for _ in range(rounds):
        for which, done in found.items():
            done.append(await one_round(side, kernel, channels, seconds, pause, which == "the executor"))
    await channels.close()
    return found


def report(found: dict[str, list[Round]], size: int) -> str:
    table = Table(
        f"One replica of a kernel with {size / 2**30:.2f} GiB moves", ("what moves", "what", "measured", "bar")
    )
    for which, rounds in found.items():
        usual = [took for one in rounds for took in one.usual]
        meanwhile = [took for one in rounds for took in one.meanwhile]
        table.add(which, "time, median", f"{statistics.median(one.took for one in rounds):.1f} s", "")
        table.add(which, "time, worst", f"{max(one.took for one in rounds):.1f} s", f"≤ {BAR_MOVE:.0f} s")
        table.add(which, "usual cell, p50", f"{percentile(usual, 50) * 1e3:.1f} ms", "")
        table.add(which, "usual cell, longest", f"{max(usual) * 1e3:.1f} ms", "")
        table.add(which, "cell meanwhile, p50", f"{percentile(meanwhile, 50) * 1e3:.1f} ms", "")
        table.add(which, "cell meanwhile, longest", f"{max(meanwhile) * 1e3:.1f} ms", "")
        waits = max(max(one.meanwhile) - statistics.median(one.usual) for one in rounds)
        table.add(which, "longest − usual p50", f"{waits * 1e3:.1f} ms", f"≤ {BAR_WAIT * 1e3:.0f} ms")
        table.add(which, "cells, all ok", f"{len(usual) + len(meanwhile)}", "")
    return table.render()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the namespace (1 GiB)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of cells before each move")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds between two cells")
    options = parser.parse_args()
    with nbos_hub(options=("--hosts", "4")) as hub:
        found = asyncio.run(measure(hub, options.size, options.rounds, options.seconds, options.pause))
    print(report(found, options.size))


if __name__ == "__main__":
    main()
