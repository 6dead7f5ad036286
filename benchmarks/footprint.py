"""What NBOS takes while nobody does anything, and what a kernel leaves in etcd.

Resident memory and processor time of every process of `nbos up`, by kind, with three hosts and idle kernels
of three replicas each: how much is resident, and how much of that is the process's own ("private", shared with no
other). "Ours" are the daemons, the gateway, the routers, the replicas and `nbos up` itself;
JupyterHub, its proxy, the Jupyter Server and etcd are shown, and counted apart. With --cells N one kernel
then runs N cells and the bytes that etcd holds for it are counted (keys and values below its prefix).

With --namespace MB, and nothing else of the above: what ten arrays of so many MB together cost on the executor and on
each standby (private memory), with the option `lazy` and without; and the first cell after a kill -9 of the executor.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections import defaultdict
from pathlib import Path

import psutil
from measure import Running, Table, nbos_hub

from nbos_cluster import keys
from nbos_cluster.etcd import Etcd
from tests.system.channels import Channels
from tests.system.hubclient import Server
from tests.system.nbosenv import etcd_of, executor, settled

KINDS = {
    "jupyterhub.singleuser": "Jupyter Server",  # first: its command line names our extension
    "nbos_spawner.gateway": "gateway",
    "nbos_spawner.proxy": "proxy",
    "nbos_kernel.warm": "kept warm",  # before replicas: its name begins with theirs
    "nbos_kernel": "replica",
    "nbos_provisioner.router": "router",
    "gpu_daemon": "daemon",
    "nbos.cli": "nbos up",
    "jupyterhub": "JupyterHub",
    "etcd": "etcd",
}
OURS = ("nbos up", "daemon", "gateway", "router", "kept warm", "replica")
BARS = {"router": "≤ 60", "daemon": "≤ 120"}
PRIVATE_BARS = {"replica": "≤ 60"}


def kind_of(process: psutil.Process) -> str:
    """By the first word of the table that stands in the command line's program or module."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        words = process.cmdline()[:6]
        for fragment, kind in KINDS.items():
            if any(fragment in Path(word).name or word.startswith(fragment) for word in words):
                return kind
    return "other"


def family(hub: Running) -> list[psutil.Process]:
    """Everything `nbos up` started: its descendants, and what was started in its state directory and left
    its parent.
    """
    found = {process.pid: process for process in [hub.process, *hub.process.children(recursive=True)]}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(str(hub.directory) in word for word in process.cmdline()):
                found.setdefault(process.pid, process)
    return [process for process in found.values() if process.is_running()]


async def start_kernels(hub: Running, count: int) -> tuple[Server, list[str]]:
    """Ten a user, the most that one may have by default; the server is the first user's, as is the first kernel."""
    servers: list[Server] = []
    kernels = []
    for number in range(count):
        if number % 10 == 0:
            servers.append(await hub.server(f"footprint-{number // 10}"))
        server = servers[-1]
        kernel = await hub.start_kernel(server)
        channels = await server.open(kernel)
        await channels.execute("x = 1")
        await channels.close()
        await settled(hub.hub, kernel, timeout=60)
        kernels.append(kernel)
    return servers[0], kernels


def idle(hub: Running, seconds: float) -> Table:
    processes = family(hub)
    began = {process: processor_seconds(process) for process in processes}
    start = time.perf_counter()
    time.sleep(seconds)  # the measurement itself, not a wait for a condition
    took = time.perf_counter() - start
    memory: dict[str, list[float]] = defaultdict(list)
    private: dict[str, list[float]] = defaultdict(list)
    busy: dict[str, float] = defaultdict(float)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            kind = kind_of(process)
            memory[kind].append(process.memory_info().rss / 1e6)
            private[kind].append(process.memory_full_info().uss / 1e6)
            busy[kind] += (processor_seconds(process) - began[process]) / took * 100
    return tabulate(memory, private, busy, seconds)


def processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def tabulate(
    memory: dict[str, list[float]], private: dict[str, list[float]], busy: dict[str, float], seconds: float
) -> Table:
    columns = ("process", "how many", "MB each", "largest", "bar", "private MB", "largest", "bar", "% of one core, all")
    table = Table(f"An idle cluster over {seconds:g} s", columns)
    for kind in sorted(memory, key=lambda kind: (kind not in OURS, kind)):
        sizes = memory[kind]
        row = [str(len(sizes)), f"{statistics.median(sizes):.0f}", f"{max(sizes):.0f}", BARS.get(kind, "")]
        own = private[kind]
        row += [f"{statistics.median(own):.0f}", f"{max(own):.0f}", PRIVATE_BARS.get(kind, "")]
        table.add(kind, *row, f"{busy[kind]:.2f}")
    table.add("ours together", "", "", "", "", "", "", "< 3", f"{sum(busy[kind] for kind in OURS):.2f}")
    return table


async def bytes_after(hub: Running, server: Server, kernel: str, cells: int) -> str:
    channels = await server.open(kernel)
    began = time.perf_counter()
    for number in range(cells):
        await channels.execute(f"x = {number}", timeout=60)
    await channels.close()
    took = time.perf_counter() - began
    await settled(hub.hub, kernel)
    endpoints, tls = etcd_of(hub.directory)
    async with Etcd(endpoints, tls=tls) as etcd:
        found, _ = await etcd.range(keys.kernel(kernel))
        status = await etcd.status()
    held = sum(len(kv.key.encode()) + len(kv.value) for kv in found)
    return (
        f"after {cells} cells ({took / max(cells, 1) * 1e3:.1f} ms each): {held:,} bytes in {len(found)} keys "
        f"(bar: < 5,000,000 after 10,000); etcd says {status}"
    )


async def private_memory(hub: Running, kernel: str, channels: Channels) -> dict[int, int]:
    """Bytes that no other process shares, by replica."""
    await channels.execute("pass", timeout=600)  # its bid waits until the cell before is in the log
    found = await settled(hub.hub, kernel, timeout=300)
    return {replica.index: psutil.Process(replica.pid).memory_full_info().uss for replica in found}


async def namespace_of(hub: Running, lazy: str, megabytes: int) -> tuple[str, ...]:
    """A row: MB that the values cost on the executor, on the standbys, on the next executor; seconds of its cells."""
    server = await hub.server(f"user-{lazy.lower()}", {"lazy": lazy})
    kernel = await hub.start_kernel(server)
    channels = await server.open(kernel)
    await channels.execute("import numpy as np", timeout=60)
    before = await private_memory(hub, kernel, channels)
    count = megabytes * 1_000_000 // 80
    make = f"arrays = {{}}\nfor i in range(10): globals()[f'a{{i}}'] = np.random.default_rng(i).random({count})\ndel i"
    await channels.execute(make, timeout=600)
    held = await private_memory(hub, kernel, channels)
    first = await executor(hub.hub, kernel)
    grown = {index: (held[index] - before[index]) / 1e6 for index in held}
    os.kill(first.pid, signal.SIGKILL)
    took = []
    for code in ("x = 1", "x = float(a3[0])"):
        began = time.perf_counter()
        await channels.execute(code, timeout=600)
        took.append(f"{time.perf_counter() - began:.2f}")
    now = await private_memory(hub, kernel, channels)
    second = (await executor(hub.hub, kernel)).index
    await channels.close()
    standbys = [f"{mb:.0f}" for index, mb in grown.items() if index != first.index]
    touched = f"{(now[second] - before[second]) / 1e6:.0f}"
    return (lazy, f"{grown[first.index]:.0f}", ", ".join(standbys), touched, *took)


async def lazy_rows(hub: Running, megabytes: int) -> Table:
    title = f"Ten arrays, {megabytes} MB together, on three replicas; then a kill -9 of the executor"
    columns = ("lazy", "executor MB", "standbys MB", "new executor MB, one array used", "first cell s", "using one s")
    table = Table(title, columns)
    for lazy in ("off", "16M"):
        table.add(*await namespace_of(hub, lazy, megabytes))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernels", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--cells", type=int, default=0, help="then run so many cells (10000: a few minutes)")
    parser.add_argument("--warm", type=int, default=1, help="replicas kept warm on each host; 0: none")
    parser.add_argument("--preload", default="", metavar="MODULES", help="what they have imported, as of `nbos up`")
    parser.add_argument("--namespace", type=int, default=0, metavar="MB", help="what large values cost (see above)")
    options = parser.parse_args()
    with nbos_hub(options=["--warm", str(options.warm), "--preload", options.preload]) as hub:
        if options.namespace:
            print(asyncio.run(lazy_rows(hub, options.namespace)).render())
            return
        server, kernels = asyncio.run(start_kernels(hub, options.kernels))
        print(idle(hub, options.seconds).render(), flush=True)
        if options.cells:
            print(asyncio.run(bytes_after(hub, server, kernels[0], options.cells)))


if __name__ == "__main__":
    main()
