"""Runs inside a user's server container (compose.py sends it there): cells of a plain ipykernel and of the NBOS kernel
with the given id, in turns, with a pause before each. Prints the seconds of each as JSON. Nothing but jupyter_client is
there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from jupyter_core.paths import jupyter_runtime_dir

WARM_UP, ROUNDS = 20, 5


def cell(client: BlockingKernelClient) -> float:
    """iopub is read to its idle, so that no side saves work that a client must do."""
    began = time.perf_counter()
    msg_id = client.execute("pass")
    while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != msg_id:
        continue
    took = time.perf_counter() - began
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == msg_id and message["content"].get("execution_state") == "idle":
            return took


def main() -> None:
    kernel, cells, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    plain = KernelManager(kernel_name="python3")
    plain.start_kernel()
    sides = {"plain": plain.client(), "nbos": BlockingKernelClient()}
    sides["nbos"].load_connection_file(str(Path(jupyter_runtime_dir()) / f"kernel-{kernel}.json"))
    took: dict[str, list[float]] = {name: [] for name in sides}
    for client in sides.values():
        client.start_channels()
        client.wait_for_ready(timeout=60)
        for _ in range(WARM_UP):
            cell(client)
    for number in range(ROUNDS):
        for name, client in sides.items():
            block = cells * (number + 1) // ROUNDS - cells * number // ROUNDS
            for _ in range(block):
                time.sleep(pause)
                took[name].append(cell(client))
    for client in sides.values():
        client.stop_channels()
    plain.shutdown_kernel(now=True)
    print(json.dumps(took))


if __name__ == "__main__":
    main()
