"""How long a person waits for something new: a kernel's first reply, and the login page; NBOS beside plain
Jupyter.

A kernel is counted from asking for it until the reply to its first cell, sent as early as a client can send
it. Kernels of the two sides are started in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from direct import Kernels, changed_environment, kernels, nbos_environment
from measure import PLAIN_KERNEL, Running, Table, nbos_hub, ratio, scratch, stock_hub

from tests.system.nbosenv import kernelspec_name


def first_reply(here: Kernels, name: str) -> float:
    """Start a kernel, run one cell, end it: the seconds until the cell's reply."""
    began = time.perf_counter()
    with here.started(name) as client:
        msg_id = client.execute("1 + 1")
        while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != msg_id:
            pass
        return time.perf_counter() - began


def first_replies(hub: Running, rounds: int) -> tuple[list[float], list[float]]:
    env = nbos_environment(hub)
    name = kernelspec_name(env)
    with changed_environment(env), kernels() as here:
        pairs = [(first_reply(here, PLAIN_KERNEL), first_reply(here, name)) for _ in range(rounds)]
    return [plain for plain, _ in pairs], [ours for _, ours in pairs]


def login_pages(state: Path) -> tuple[float, float, float]:
    """The stock hub, `nbos up` in an empty state directory, `nbos up` in one that was used before."""
    with stock_hub() as stock:
        plain = stock.ready_after
    with nbos_hub(state) as first:
        fresh = first.ready_after
    with nbos_hub(state) as second:
        return plain, fresh, second.ready_after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    table = Table("Start, seconds", ("from … to", "plain", "NBOS", "ratio", "bar"))
    with nbos_hub() as hub:
        plain, nbos = first_replies(hub, options.rounds)
    for what, of in (("median", statistics.median), ("slowest", max)):
        a, b = of(plain), of(nbos)
        bar = "≤ 3 ×" if what == "median" else ""
        table.add(f"new kernel to first reply, {what} of {len(plain)}", f"{a:.2f}", f"{b:.2f}", ratio(b, a), bar)
    with scratch("nbos-startup-") as state:
        stock, fresh, again = login_pages(state)
    table.add("command to login page, new state directory", f"{stock:.1f}", f"{fresh:.1f}", "", "≤ 15 s")
    table.add("command to login page, started before", "", f"{again:.1f}", "", "≤ 15 s")
    print(table.render())


if __name__ == "__main__":
    main()
