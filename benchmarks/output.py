"""How long output takes on its way out: 10,000 printed lines, and one image of 20 MB; NBOS beside plain
Jupyter.

Counted from the request until the kernel is idle and every byte has arrived at the client. The sides take
turns; the table shows medians.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from direct import direct_nbos, direct_plain, is_idle
from jupyter_client.blocking.client import BlockingKernelClient
from measure import Running, Table, nbos_hub, ratio, stock_hub

from tests.system.channels import Channels, ConnectionLost

LINES = 10_000
IMAGE = 20_000_000
TEXT = "".join(f"{number}\n" for number in range(LINES))
PRINT = f"for number in range({LINES}):\n    print(number)"
PREPARE = f"import os\nfrom IPython.display import Image, display\npicture = os.urandom({IMAGE})"
SHOW = "display(Image(data=picture, format='png'))"
CASES = {"10,000 lines": (PRINT, "≤ 1.3 ×"), "20 MB image": (SHOW, "≤ 1.5 ×")}
ENCODED = len(base64.b64encode(bytes(IMAGE))) - 1


@dataclass
class Samples:
    plain: list[float] = field(default_factory=list)
    nbos: list[float] = field(default_factory=list)
    note: str = ""


def arrived(text: str, image: int, code: str) -> None:
    """A side that loses output must not look fast."""
    if code == PRINT and text != TEXT:
        raise AssertionError(f"{len(text)} characters of {len(TEXT)} arrived")
    if code == SHOW and image < ENCODED:
        raise AssertionError(f"an image of {image} characters arrived, {ENCODED} were sent")


def over_zmq(client: BlockingKernelClient, code: str) -> float:
    began = time.perf_counter()
    msg_id = client.execute(code)
    text, image = [], 0
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != msg_id:
            continue
        if message["msg_type"] == "stream":
            text.append(message["content"]["text"])
        elif message["msg_type"] == "display_data":
            image = len(message["content"]["data"]["image/png"])
        elif is_idle(message):
            break
    took = time.perf_counter() - began
    client.get_shell_msg(timeout=60)
    arrived("".join(text), image, code)
    return took


async def over_websocket(channels: Channels, code: str) -> float:
    result = await channels.execute(code, timeout=20)
    pictures = [m.content["data"]["image/png"] for m in result.outputs if m.type == "display_data"]
    arrived(result.stdout, max(map(len, pictures), default=0), code)
    return result.finished - result.sent


def measure_direct(hub: Running, rounds: int) -> dict[str, Samples]:
    samples = {name: Samples() for name in CASES}
    with direct_plain() as plain, direct_nbos(hub) as nbos:
        for client in (plain, nbos):
            client.execute_interactive(PREPARE, timeout=60)
            client.execute_interactive("pass", timeout=60)
            while client.shell_channel.msg_ready():
                client.get_shell_msg(timeout=1)
        for name, (code, _) in CASES.items():
            for _ in range(rounds):
                samples[name].plain.append(over_zmq(plain, code))
                samples[name].nbos.append(over_zmq(nbos, code))
    return samples


async def measure_websocket(stock: Running, nbos: Running, rounds: int) -> dict[str, Samples]:
    samples = {name: Samples() for name in CASES}
    for side in (stock, nbos):
        server = await side.server("output")
        kernel = await side.start_kernel(server)
        for name, (code, _) in CASES.items():
            channels = await server.open(kernel)
            await channels.execute(PREPARE)
            took = samples[name].plain if side is stock else samples[name].nbos
            try:
                took.extend([await over_websocket(channels, code) for _ in range(rounds)])
            except (ConnectionLost, TimeoutError, AssertionError) as err:
                samples[name].note += f"{side.name}, {name}: not delivered ({str(err).partition(';')[0]})"
            await channels.close()
        await server.delete_kernel(kernel)
    return samples


def report(paths: dict[str, dict[str, Samples]]) -> str:
    table = Table("Output, request to idle, milliseconds (median)", ("path", "", "plain", "NBOS", "ratio", "bar"))
    middle: Callable[[list[float]], float] = lambda took: statistics.median(took) if took else 0.0  # noqa: E731
    notes = []
    for path, cases in paths.items():
        for name, samples in cases.items():
            plain, nbos = middle(samples.plain), middle(samples.nbos)
            bar = CASES[name][1] if path == "jupyter_client" else ""
            shown = [f"{took * 1e3:.1f}" if took else "–" for took in (plain, nbos)]
            table.add(path, name, *shown, ratio(nbos, plain), bar)
            notes += [samples.note] if samples.note else []
    return "\n".join([table.render(), *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with nbos_hub() as nbos:
        paths = {"jupyter_client": measure_direct(nbos, options.rounds)}
        with stock_hub() as stock:
            paths["hub, proxy, websocket"] = asyncio.run(measure_websocket(stock, nbos, options.rounds))
    print(report(paths))


if __name__ == "__main__":
    main()
