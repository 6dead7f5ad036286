"""What crossing real machines costs, on the compose cluster: three hosts with an Engine each, three etcd members, TLS.

A cell that does nothing, asked for by jupyter_client inside the user's server container: a plain ipykernel there beside
the notebook's NBOS kernel of three replicas, in turns. Without a pause between cells (`--pause`), what NBOS does after
a reply is paid for by the next cell. Then a host killed (its power cut) during a cell, with default
leases: seconds until the user is told, and until the cell runs again on another host.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import time
from pathlib import Path

from measure import Table, percentile, ratio

from tests.cluster.machines import Machines
from tests.system.cluster import Notebook

INSIDE = Path(__file__).with_name("compose_inside.py")
LONG = "import time; print('begun', flush=True); time.sleep(3)"
CELL_BARS = {50: "≤ 4 ×", 99: "≤ 60 ms"}


def cells_inside(machines: Machines, notebook: Notebook, cells: int, pause: float) -> dict[str, list[float]]:
    """The script of what happens there goes in through stdin, its figures come out as JSON."""
    server = f"jupyter-{notebook.server.user}"
    command = ["docker", "exec", "-i", machines.container("hub"), "docker", "exec", "-i", server]
    command += ["python3", "-", notebook.kernel, str(cells), str(pause)]
    done = subprocess.run(command, input=INSIDE.read_text(), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"inside {server}: {done.stderr[-2000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


async def host_killed(machines: Machines, notebook: Notebook) -> tuple[float, float]:
    """Seconds until the cell's output says so, and until the cell has begun again."""
    cell = await notebook.channels.submit(LONG)
    await cell.text("begun")
    host = (await notebook.executor()).host
    async with machines.dead(host):
        began = time.perf_counter()  # `docker kill` has returned
        await cell.text("again", 40)
        told = time.perf_counter() - began
        while cell.written().count("begun\n") < 2:
            await asyncio.sleep(0.005)
        again = time.perf_counter() - began
        if (await cell.result(60)).status != "ok":
            raise RuntimeError(f"the cell failed: {cell.written()}")
    await machines.whole()
    await notebook.settled(90)
    return told, again


async def measure(
    machines: Machines, cells: int, pause: float, rounds: int
) -> tuple[dict[str, list[float]], list[tuple[float, float]]]:
    await machines.whole()
    notebook = await Notebook.open(machines, "ada")
    await notebook.settled(90)
    took = await asyncio.to_thread(cells_inside, machines, notebook, cells, pause) if cells else {}
    killed = [await host_killed(machines, notebook) for _ in range(rounds)]
    await notebook.close()
    return took, killed


def report(took: dict[str, list[float]], killed: list[tuple[float, float]]) -> None:
    if took:
        table = Table(
            f"`pass` × {len(took['nbos'])} over the compose network, request to reply, milliseconds",
            ("", "plain", "NBOS", "ratio", "bar"),
        )
        for percent, bar in CELL_BARS.items():
            plain, nbos = percentile(took["plain"], percent), percentile(took["nbos"], percent)
            table.add(f"p{percent}", f"{plain * 1e3:.2f}", f"{nbos * 1e3:.2f}", ratio(nbos, plain), bar)
        print(table.render(), end="\n\n")
    if killed:
        table = Table("A host killed during a cell, default leases, seconds", ("", "told", "runs again", "bar"))
        for number, (told, again) in enumerate(killed, 1):
            table.add(f"kill {number}", f"{told:.2f}", f"{again:.2f}", "≤ 5")
        print(table.render())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each cell")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--cluster", default="", metavar="PROJECT:PORT:NETWORK:TAG", help="one that is up already")
    options = parser.parse_args()
    if options.cluster:
        project, port, network, tag = options.cluster.split(":")
        report(
            *asyncio.run(
                measure(Machines(project, int(port), network, tag), options.cells, options.pause, options.kills)
            )
        )
        return
    machines = Machines("nbos-bench")
    try:
        machines.up()
        report(*asyncio.run(measure(machines, options.cells, options.pause, options.kills)))
    finally:
        machines.down()


if __name__ == "__main__":
    main()
