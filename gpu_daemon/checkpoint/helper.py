"""The process that calls the driver for a host's daemon: `python -m gpu_daemon.checkpoint.helper`.

One for as long as the daemon lives, since `cuInit` takes seconds. Its first line says `{"version": …}`, or
`{"why": …}` and it ends. Then a JSON object a line comes in, `{"id", "do", "pid", …}`, and one goes out, `{"id",
"error", "state"}`, in the order in which the driver is done: each runs on a thread of its own, so that one that hangs
holds up no other. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from gpu_daemon.checkpoint.driver import Driver, Refused, TooOld


def carry_out(driver: Driver, asked: dict[str, Any]) -> dict[str, Any]:
    pid = int(asked["pid"])
    match asked["do"]:
        case "state":
            return {"state": driver.state(pid)}
        case "lock":
            driver.lock(pid, int(asked["timeout_ms"]))
        case "checkpoint":
            driver.checkpoint(pid)
        case "restore":
            driver.restore(pid, [(old, new) for old, new in asked.get("pairs") or ()])
        case "unlock":
            driver.unlock(pid)
        case other:
            raise ValueError(f"{other!r} is nothing that can be done")
    return {}


def main() -> None:
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(message), flush=True)

    try:
        driver = Driver()
        say({"version": driver.version()})
    except (TooOld, Refused) as err:
        say({"why": str(err)})
        return

    def answer(asked: dict[str, Any]) -> None:
        try:
            say({"id": asked["id"], "error": "", **carry_out(driver, asked)})
        except (Refused, ValueError) as err:
            say({"id": asked["id"], "error": str(err)})

    for line in sys.stdin:
        threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()
    os._exit(0)  # a thread that hangs in the driver must not keep us


if __name__ == "__main__":
    main()
