"""How long a new notebook waits for its first reply: with replicas kept warm, without, and beside plain ipykernel.

A kernel is counted from asking for it until the reply to its first cell, sent as early as a client can send it. Two
`nbos up` run at once on this machine, one with `--warm 0`; kernels of the three sides are started in turns. The first
cell is `1 + 1`, or imports a module (--module numpy torch), which the warm side has imported ahead. Before each start
the pools are full, a router waits (as in any Jupyter Server, for both sides), and what the start before left behind
(replicas that end) is over: how fast pools fill again under a rush is another question (--rush N: so many at once).
With --runtime docker replicas are containers of --image; their homes make each container its owner's.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil
from direct import OWNER, Kernels, changed_environment, kernels, nbos_environment
from measure import PLAIN_KERNEL, Running, Table, nbos_hub, percentile, ratio

from tests.system.nbosenv import kernelspec_name, nbos_status

SIDES = ("plain", "cold", "warm")
KINDS = {"process": "processes", "docker": "containers"}


def first_reply(here: Kernels, name: str, code: str) -> float:
    """Start a kernel, run one cell, end it: the seconds until the cell's reply."""
    began = time.perf_counter()
    with here.started(name) as client:
        msg_id = client.execute(code)
        while (reply := client.get_shell_msg(timeout=120))["parent_header"].get("msg_id") != msg_id:
            pass
        took = time.perf_counter() - began
    if reply["content"]["status"] != "ok":
        raise RuntimeError(f"{code!r} gave {reply['content']}")
    return took


def starter(hub: Running | None) -> Callable[[Kernels, str], float]:
    """first_reply on this side; None: plain."""
    if hub is None:
        return lambda here, code: first_reply(here, PLAIN_KERNEL, code)
    env = nbos_environment(hub)

    def start(here: Kernels, code: str) -> float:
        with changed_environment(env):
            return first_reply(here, kernelspec_name(env), code)

    return start


def filled(hub: Running, timeout: float = 120.0) -> None:
    """Until every host of it has as many warm replicas as it wants."""
    deadline = time.monotonic() + timeout
    while True:
        pools = [warm for host in nbos_status(hub.directory)["hosts"] for warm in host["warm"]]
        if all(warm["ready"] >= warm["wanted"] for warm in pools):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"the pools are not full after {timeout:g} s: {pools}")
        time.sleep(0.2)


def rested(busy: float = 15.0, timeout: float = 30.0) -> None:
    """Until the processor has been nearly idle for half a second: less than `busy` per cent of it in use."""
    deadline = time.monotonic() + timeout
    psutil.cpu_percent()
    time.sleep(0.5)
    while (used := psutil.cpu_percent()) >= busy:
        if time.monotonic() > deadline:
            print(f"the machine does not come to rest ({used:.0f} % of its processor in use); going on")
            return
        time.sleep(0.5)


def in_turns(cold: Running, warm: Running, code: str, rounds: int) -> dict[str, list[float]]:
    sides = {"plain": starter(None), "cold": starter(cold), "warm": starter(warm)}
    took: dict[str, list[float]] = {side: [] for side in SIDES}
    with kernels() as here:
        for _ in range(rounds + 1):
            for side in SIDES:
                filled(warm)
                here.router_waits()
                rested()
                took[side].append(sides[side](here, code))
    return {side: seconds[1:] for side, seconds in took.items()}  # the first round reads files from the disk


def at_once(hub: Running, code: str, count: int) -> list[float]:
    env = nbos_environment(hub)
    filled(hub)
    with changed_environment(env), kernels() as here, ThreadPoolExecutor(count) as pool:
        name = kernelspec_name(env)
        return list(pool.map(lambda _: first_reply(here, name, code), range(count)))


def show(table: Table, what: str, took: dict[str, Sequence[float]]) -> None:
    for name, of in (("p50", statistics.median), ("p95", lambda seconds: percentile(seconds, 95))):
        plain, cold, warm = (of(took[side]) for side in SIDES)
        bars = ("≤ 1 s", "≤ 0.2 ×") if name == "p50" else ("", "")
        row = (f"{plain:.2f}", f"{cold:.2f}", f"{warm:.2f}", bars[0], ratio(warm, cold), bars[1], ratio(warm, plain))
        table.add(f"{what}, {name} of {len(took['warm'])}", *row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--module", nargs="*", help="also with a cell that imports it (numpy torch; in containers none)"
    )
    parser.add_argument("--runtime", choices=("process", "docker"), default="process")
    parser.add_argument("--image", default="nbos/kernel")
    parser.add_argument("--rush", type=int, default=0, metavar="N", help="then so many kernels at once")
    options = parser.parse_args()
    modules = options.module if options.module is not None else {"process": ["numpy", "torch"]}.get(options.runtime, [])
    runtime = ["--runtime", "docker", "--image", options.image] if options.runtime == "docker" else []
    columns = ("first cell", "plain s", "without s", "warm s", "bar", "warm / without", "bar", "warm / plain")
    table = Table(f"New notebook to first reply, replicas as {KINDS[options.runtime]}", columns)
    with contextlib.ExitStack() as stack:
        cold = stack.enter_context(nbos_hub(options=["--warm", "0", *runtime]))
        preload = ["--preload", ",".join(modules)] if modules else []
        warm = stack.enter_context(nbos_hub(options=["--warm", "1", *preload, *runtime]))
        for hub in (cold, warm):
            # What a server's start makes: replicas in containers have it mounted, and do not start without.
            (hub.directory / "homes" / OWNER).mkdir(parents=True, exist_ok=True)
        cells = ["1 + 1", *(f"import {name}" for name in modules)]
        for code in cells:
            show(table, code, in_turns(cold, warm, code, options.rounds))
        if options.rush:
            took = {"plain": [0.0], "cold": at_once(cold, cells[-1], options.rush)}
            show(table, f"{cells[-1]}, at once", {**took, "warm": at_once(warm, cells[-1], options.rush)})
    print(table.render())


if __name__ == "__main__":
    main()
