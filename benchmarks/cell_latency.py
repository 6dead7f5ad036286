"""How long a cell that does nothing takes, from the request to its reply: NBOS beside plain Jupyter.

Two paths: straight to the kernel with jupyter_client, and as a browser does it, through JupyterHub's proxy
and the kernel's websocket. The sides take turns in blocks, so that both feel the same machine. Cells follow
each other without a pause: what NBOS does after a reply (capture, append) is paid for by the next cell.
After the last cell the number of committed entries is read back: every cell of NBOS counted here has an
entry in etcd.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from direct import direct_nbos, direct_plain, is_idle
from jupyter_client.blocking.client import BlockingKernelClient
from measure import Running, Table, nbos_hub, percentile, ratio, stock_hub

from tests.system.channels import Channels
from tests.system.hubclient import eventually

CODE = "pass"
WARM_UP = 20
ROUNDS = 5
BARS = {"jupyter_client": ("≤ 2.5 ×", "≤ 3 ×"), "hub, proxy, websocket": ("≤ 0.25 ×", "")}


@dataclass
class Samples:
    plain: list[float] = field(default_factory=list)
    nbos: list[float] = field(default_factory=list)


def cell(client: BlockingKernelClient) -> float:
    """One cell over ZMQ; iopub is read to its idle so that no side saves work that a client must do."""
    began = time.perf_counter()
    msg_id = client.execute(CODE)
    while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != msg_id:
        pass
    took = time.perf_counter() - began
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == msg_id and is_idle(message):
            return took


async def cell_over_websocket(channels: Channels) -> float:
    return (await channels.execute(CODE, timeout=60)).seconds


def measure_direct(hub: Running, cells: int) -> Samples:
    samples = Samples()
    with direct_plain() as plain, direct_nbos(hub) as nbos:
        sides = [(plain, samples.plain), (nbos, samples.nbos)]
        for client, _ in sides:
            for _ in range(WARM_UP):
                cell(client)
        for block in blocks(cells):
            for client, took in sides:
                took.extend(cell(client) for _ in range(block))
    return samples


async def measure_websocket(stock: Running, nbos: Running, cells: int) -> Samples:
    samples = Samples()
    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for side, took in ((stock, samples.plain), (nbos, samples.nbos)):
            server = await side.server("latency")
            kernel = await side.start_kernel(server)
            stack.push_async_callback(server.delete_kernel, kernel)
            channels = await server.open(kernel)
            stack.push_async_callback(channels.close)
            opened.append((channels, took))
            for _ in range(WARM_UP):
                await cell_over_websocket(channels)
        for block in blocks(cells):
            for channels, took in opened:
                took.extend([await cell_over_websocket(channels) for _ in range(block)])
        print(await committed(nbos, kernel, cells + WARM_UP))
    return samples


async def committed(hub: Running, kernel: str, cells: int) -> str:
    """Wait until the last entry of the kernel is in etcd, and say so."""

    async def last() -> int | None:
        model = await hub.hub.service("GET", f"nbos/api/kernels/{kernel}")
        return int(model["last"]) if int(model["last"]) >= cells else None

    number = await eventually(last, f"{cells} committed entries of kernel {kernel}", timeout=30)
    return f"committed entries of kernel {kernel[:8]}: {number} for {cells} cells"


def blocks(cells: int) -> Iterator[int]:
    for number in range(ROUNDS):
        yield cells * (number + 1) // ROUNDS - cells * number // ROUNDS


def report(paths: dict[str, Samples], cells: int) -> str:
    table = Table(
        f"`{CODE}` × {cells}, request to reply, milliseconds",
        ("path", "", "plain", "NBOS", "ratio", "bar"),
    )
    for path, samples in paths.items():
        for percent, bar in zip((50, 99), BARS[path], strict=True):
            plain, nbos = percentile(samples.plain, percent), percentile(samples.nbos, percent)
            table.add(path, f"p{percent}", f"{plain * 1e3:.2f}", f"{nbos * 1e3:.2f}", ratio(nbos, plain), bar)
    return table.render()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, default=500)
    options = parser.parse_args()
    paths: dict[str, Samples] = {}
    with nbos_hub() as nbos:
        paths["jupyter_client"] = measure_direct(nbos, options.cells)
        with stock_hub() as stock:
            paths["hub, proxy, websocket"] = asyncio.run(measure_websocket(stock, nbos, options.cells))
    print(report(paths, options.cells))


if __name__ == "__main__":
    main()
