"""What slices do on a real GPU, in one table, within eight minutes.

- confinement: the SM numbers that kernels see in a slice, and whether disjoint slices have disjoint ones, in one
  process and in two;
- neighbours: two processes on the same and on disjoint slices, beside each alone, taking turns and under MPS;
- stealing: an important tenant with bursts, and a steady one that has its TPCs while it is idle, under MPS;
- giving back: 1, 10 and 40 GiB of tensors to pinned host memory and back into the same tensors, bytes compared; and
  the same by the driver's checkpoint of the whole process, asked as a host's daemon asks for it;
- speed by TPCs: l(t) = m/t + b for a GEMM, attention, a memory-bound operation and a small network, and the smallest
  slice within 4 % of the whole device.

Starts an MPS daemon of its own, with pipes in a folder of its own, where that is allowed, and ends it. Touches no
setting of the device. Without a GPU it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_figures import confinement, fit, ranges, seconds, slowdown, smallest, table
from gpu_stealing import Ended, stealing

SIDE = Path(__file__).with_name("gpu_side.py")
MPS = "nvidia-cuda-mps-control"
WORK = ("gemm", "attention", "memory-bound", "small network")
SLIP = 1.04
BEGIN = 25.0
"""Seconds that two processes have to come up before they are measured together."""


class Failed(Exception):
    """A part could not be measured; says why."""


def start(asked: dict[str, Any], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(SIDE), json.dumps(asked)]
    environ = {**os.environ, **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], within: float) -> Any:
    try:
        out, err = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Failed(f"not done within {within:.0f} s") from None
    if process.returncode:
        raise Failed((err.strip().splitlines() or [f"ended with {process.returncode}"])[-1][:150])
    return json.loads(out.splitlines()[-1])


def ask(environment: dict[str, str], within: float = 120.0, **asked: Any) -> Any:
    return finish(start(asked, environment), within)


def no_gpu() -> str:
    """Why nothing can be measured here, '' when it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed: pip install torch"
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) was built without CUDA; install one with it"
    if torch.cuda.device_count() == 0:  # does not start CUDA in this process
        return "no NVIDIA GPU is visible to this process"
    return ""


@contextlib.contextmanager
def mps() -> Iterator[tuple[dict[str, str] | None, str]]:
    """The environment of MPS clients, or None and why there is no MPS."""
    command = shutil.which(MPS)
    if command is None:
        yield None, f"{MPS} is not on the PATH"
        return
    with tempfile.TemporaryDirectory(prefix="nbos-mps-") as folder:
        places = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environ = {**os.environ, **places}
        begun = subprocess.run([command, "-d"], env=environ, capture_output=True, text=True, check=False)
        if begun.returncode:
            yield None, f"{MPS} does not start: {(begun.stdout + begun.stderr).strip()[:120]}"
            return
        try:
            yield places, ""
        finally:
            subprocess.run([command], input="quit\n", env=environ, capture_output=True, text=True, check=False)


def confined(tpcs: int, environment: dict[str, str]) -> list[list[str]]:
    """Slices of one process, and the same slices in two."""
    third = tpcs // 3
    slices = {"A": list(range(third)), "B": list(range(third, 2 * third)), "C": list(range(2 * third, tpcs))}
    granted = {name: 2 * len(numbers) for name, numbers in slices.items()}
    seen = ask(environment, do="sms", slices=slices)
    rows = [[f"slice {name}", f"{granted[name]} SMs granted", f"seen: {ranges(seen[name])}"] for name in sorted(seen)]
    rows.append(["disjoint, within the grant", "", "; ".join(confinement(seen, granted)) or "yes"])
    again = ask(environment, do="sms", slices={"B": slices["B"]})
    same = set(again["B"]) == set(seen["B"])
    return [*rows, ["slice B in another process", "", "the same SMs" if same else f"other SMs: {ranges(again['B'])}"]]


def neighbours(tpcs: int, environment: dict[str, str], long: float) -> list[list[str]]:
    """A GEMM in two processes."""
    half = tpcs // 2
    first, second = list(range(half)), list(range(half, 2 * half))
    alone = ask(environment, do="run", work="gemm", tpcs=first, at=0.0, seconds=long)["rate"]
    rows = []
    for name, other in (("disjoint slices", second), ("the same slice", first)):
        at = time.time() + BEGIN
        asked = {"do": "run", "work": "gemm", "at": at, "seconds": long}
        sides = [start({**asked, "tpcs": numbers}, environment) for numbers in (first, other)]
        one, two = (finish(side, BEGIN + 60 + 2 * long) for side in sides)
        late = " (one came late: not measured together)" if one["late"] or two["late"] else ""
        both = f"{slowdown(one['rate'], alone)} and {slowdown(two['rate'], alone)} of its speed alone"
        shared = len(set(one["sms"]) & set(two["sms"]))
        rows.append([name, both, f"{shared} SMs in common{late}"])
    return rows


def stolen(tpcs: int, environment: dict[str, str], long: float) -> list[list[str]]:
    try:
        return stealing(lambda asked: start(asked, environment), tpcs, 4 * long)
    except Ended as err:
        raise Failed(str(err)) from err


def speeds(tpcs: int, work: str, long: float) -> list[list[str]]:
    sizes = sorted({max(1, tpcs // part) for part in (16, 8, 4, 2, 1)})
    found = {int(size): value for size, value in ask({}, do="sweep", work=work, sizes=sizes, seconds=long).items()}
    fitted = fit(found)
    measured = ", ".join(f"{size}: {seconds(value)}" for size, value in sorted(found.items()))
    least = smallest(fitted, tpcs, SLIP)
    law = f"m {seconds(fitted.m)}, b {seconds(fitted.b)}, off by ≤ {100 * fitted.error:.0f} %"
    return [[work, f"{law}; within 4 %: {least} of {tpcs} TPCs", measured]]


def given_back(gib: int) -> list[list[str]]:
    """Offload to pinned host memory, and back into the same tensors."""
    found = ask({}, within=240.0, do="give back", gib=gib)
    if "skipped" in found:
        return [["left out", found["skipped"], ""]]
    stayed = "".join(f"; stayed: {reason}" for reason in found["stayed"])
    speed = f"{found['out'] / 1e9:.1f} GB/s out, {found['back'] / 1e9:.1f} GB/s back"
    same = "every byte the same" if found["same"] else "BYTES DIFFER"
    return [[f"{gib} GiB", speed, f"{same}, {found['left'] / 2**20:.0f} MiB held meanwhile{stayed}"]]


def checkpointed(gib: int) -> list[list[str]]:
    """A process with so many GiB to host memory and back by the driver, its bytes compared afterwards."""
    side = start({"do": "hold", "gib": gib}, {})
    try:
        found = first_line(side, 120.0)
        if "skipped" in found:
            return [["left out", found["skipped"], ""]]
        size, (out, back) = found["bytes"], asyncio.run(there_and_back(side.pid))
        same = "every byte the same" if finish(side, 60.0)["same"] else "BYTES DIFFER"
    finally:
        side.kill()
        side.communicate()
    speed = f"{size / out / 1e9:.1f} GB/s out, {size / back / 1e9:.1f} GB/s back"
    return [[f"{gib} GiB", speed, f"{same}; {out:.2f} s and {back:.2f} s, CUDA's context included"]]


def first_line(side: subprocess.Popen[str], within: float) -> Any:
    """What it prints before it waits."""
    timer = threading.Timer(within, side.kill)
    timer.start()
    try:
        line = side.stdout.readline() if side.stdout is not None else ""
    finally:
        timer.cancel()
    return json.loads(line) if line else finish(side, 1.0)


async def there_and_back(pid: int) -> tuple[float, float]:
    """Seconds that a checkpoint of the process took, and its restore."""
    from gpu_daemon.checkpoint.checkpoints import Checkpoints

    checkpoints, took = Checkpoints(step_within=90.0), list[float]()
    try:
        if why := await checkpoints.open():
            raise Failed(why)
        for aim, state in (("parked", "checkpointed"), ("running", "running")):
            began = time.perf_counter()
            process = await checkpoints.bring(pid, aim)  # type: ignore[arg-type]
            took.append(time.perf_counter() - began)
            if process.error or process.state != state:
                raise Failed(process.error or f"it is {process.state}")
    finally:
        await checkpoints.close()
    return took[0], took[1]


def attempt(rows: list[list[str]], heading: str, part: Callable[[], list[list[str]]], deadline: float) -> None:
    """Add what `part` measures; what goes wrong is a row, and ends nothing else."""
    rows.append([heading])
    if time.monotonic() > deadline:
        rows.append(["left out", "the time is over (--minutes)", ""])
        return
    try:
        rows += part()
    except Failed as err:
        rows.append(["failed", str(err), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="no part begins after this")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    options = parser.parse_args()
    reason = no_gpu()
    if reason:
        print(f"real_gpu.py measures on a real GPU, and there is none to use here: {reason}.", file=sys.stderr)
        sys.exit(2)
    deadline, long = time.monotonic() + 60 * options.minutes, options.seconds
    try:
        device = ask({}, do="describe")
    except Failed as err:
        print(f"real_gpu.py: no slice can be made on this device: {err}", file=sys.stderr)
        sys.exit(2)
    tpcs, rows = int(device["tpcs"]), list[list[str]]()
    off = {"CUDA_MPS_PIPE_DIRECTORY": "/dev/null"}
    attempt(rows, "confinement, by the SM numbers that kernels see", lambda: confined(tpcs, off), deadline)
    attempt(rows, "two processes, taking turns (no MPS): a GEMM", lambda: neighbours(tpcs, off, long), deadline)
    with mps() as (environment, why):
        if environment is None:
            rows += [["two processes side by side (MPS)"], ["left out", why, ""]]
        else:
            places = environment
            attempt(rows, "confinement under MPS", lambda: confined(tpcs, places), deadline)
            attempt(rows, "two processes side by side (MPS): a GEMM", lambda: neighbours(tpcs, places, long), deadline)
            attempt(rows, "idle TPCs lent (MPS): bursts of GEMMs", lambda: stolen(tpcs, places, long), deadline)
    for work in WORK:
        attempt(rows, f"seconds by TPCs: {work}", lambda work=work: speeds(tpcs, work, long), deadline)  # type: ignore[misc]
    for gib in (1, 10, 40):
        attempt(rows, f"giving back {gib} GiB", lambda gib=gib: given_back(gib), deadline)  # type: ignore[misc]
    for gib in (1, 10, 40):
        attempt(rows, f"a checkpoint with {gib} GiB", lambda gib=gib: checkpointed(gib), deadline)  # type: ignore[misc]
    print(f"{device['name']}, {tpcs} TPCs, CUDA {device['cuda'] // 1000}.{device['cuda'] % 1000 // 10}")
    print(table(rows))


if __name__ == "__main__":
    main()
