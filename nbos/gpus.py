"""`nbos gpus`: every GPU with how it is, and whose cells hold what of it: an `nvidia-smi` that knows users, kernels,
cells and slices. Asks the gateway as `nbos status` does; reads nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from nbos_spawner.sizes import show_size

from .columns import columns
from .state import StateDir
from .status import Cluster, NotRunning, collect

NOT_TOLD = "-"
NAME = 8
"""Characters of a kernel's id that the tables show: `nbos status` and --json have all of it."""

Report = dict[str, Any]


def gpus(state: StateDir, *, as_json: bool, cluster: Cluster | None = None) -> int:
    """Print it; the exit status: 0, or 1 when nothing answers."""
    try:
        found = report(collect(state, cluster))
    except NotRunning as err:
        if as_json:
            print(json.dumps({"running": False, "state_dir": str(state.path), "error": str(err)}, indent=2))
        print(f"nbos gpus: {err}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if as_json else "\n".join(tables(found, time.time())))
    return 0


def report(status: Mapping[str, Any]) -> Report:
    """What of a status is about GPUs: by host and device, each with the grants on it; and who waits."""
    hosts = [
        {
            "name": host["name"],
            "draining": host["draining"],
            "driver": host["driver"],
            "gpus": [_gpu(device, host["grants"]) for device in host["devices"]],
        }
        for host in status["hosts"]
    ]
    return {"running": True, "hosts": hosts, "away": list(status["away"]), "waiting": _waiting(status["queues"])}


def _gpu(device: Mapping[str, Any], grants: Iterable[Mapping[str, Any]]) -> Report:
    return {**device, "grants": [_grant(g, s) for g in grants for s in g["shares"] if s["uuid"] == device["uuid"]]}


def _grant(grant: Mapping[str, Any], share: Mapping[str, Any]) -> Report:
    return {
        "user": grant["owner"],
        "kernel": grant["kernel"],
        "replica": grant["replica"],
        "cell": grant["n"],
        "tpcs": list(share["tpcs"]),
        "lent": list(share.get("lent", ())),
        "memory": share["memory"],
        "whole": share["whole"],
        "mechanism": share.get("mechanism", ""),
        "since": grant.get("since", 0.0),
    }


def _waiting(tickets: Iterable[Mapping[str, Any]]) -> list[Report]:
    """By cell: it stands in the queues of several hosts, and the first with room gets it."""
    found: dict[tuple[str, int], Report] = {}
    for ticket in tickets:
        one = found.setdefault(
            (ticket["kernel"], ticket["n"]),
            {
                "user": ticket["owner"],
                "kernel": ticket["kernel"],
                "cell": ticket["n"],
                "asks": dict(ticket["resources"]),
                "since": ticket.get("since", 0.0),
                "queues": [],
            },
        )
        one["since"] = min(one["since"], ticket.get("since", 0.0))
        queue = {"host": ticket["host"], "position": ticket["position"], "reason": ticket["reason"]}
        one["queues"].append({**queue, "estimate": ticket.get("estimate", -1.0)})
    return sorted(found.values(), key=lambda one: (one["since"], one["kernel"]))


# -- for people -------------------------------------------------------------------------------------------------------


def tables(found: Report, now: float) -> list[str]:
    """The lines for people. now: Unix seconds."""
    lines = columns(
        ["HOST", "GPU", "MODEL", "TPCS", "GRANTED", "IN USE", "LOAD", "TEMP", "POWER", "HEALTH"],
        [row for host in found["hosts"] for row in _device_rows(host)],
    )
    lines += [f"host {name} is away" for name in found["away"]]
    there = [(host["name"], gpu) for host in found["hosts"] for gpu in host["gpus"]]
    held = [_held_row(name, gpu, grant, now) for name, gpu in there for grant in gpu["grants"]]
    head = ["USER", "KERNEL", "CELL", "HOST", "GPU", "TPCS", "MEMORY", "HELD BY", "FOR"]
    lines += [f"GPU {gpu['index']} of {name}: {note}" for name, gpu in there for note in _notes(gpu)]
    lines += ["", *columns(head, held)] if held else ["", "no GPU is granted: no cell that asked for one runs"]
    processes = [row for name, gpu in there for row in _process_rows(name, gpu)]
    if processes:
        lines += ["", *columns(["PROCESS", "HOST", "GPU", "MEMORY", "OF"], processes)]
    left = [_left_row(name, gpu, one) for name, gpu in there for one in gpu["left"]]
    if left:
        lines += ["", *columns(["LEFT BY", "KERNEL", "REPLICA", "HOST", "GPU", "MEMORY", "NOW"], left)]
    waiting = [_waiting_row(one, now) for one in found["waiting"]]
    if waiting:
        lines += ["", *columns(["WAITING", "KERNEL", "CELL", "ASKS FOR", "FOR", "PLACE", "WHY"], waiting)]
    return lines


def _device_rows(host: Report) -> list[list[str]]:
    name = host["name"] + (" (draining)" if host["draining"] else "")
    return [[name if not i else "", *_device_row(gpu)] for i, gpu in enumerate(host["gpus"])] or [
        [name, "none", *[""] * 8]
    ]


def _device_row(gpu: Report) -> list[str]:
    reading = gpu["reading"]
    granted = f"{show_size(gpu['memory_granted'])}/{show_size(gpu['memory'])}"
    if reading is None:
        told = [NOT_TOLD] * 4
    else:
        memory = show_size(reading["memory"]) if reading["memory"] >= 0 else NOT_TOLD
        power = "/".join(f"{reading[k]}" if reading[k] >= 0 else NOT_TOLD for k in ("power", "power_limit"))
        told = [memory, _unit(reading["utilisation"], " %"), _unit(reading["temperature"], " °C"), f"{power} W"]
    model = gpu["model"] + (" (simulated)" if gpu["kind"] == "simulated" else "")
    health = "healthy" if gpu["healthy"] else ("paused: " if gpu["passing"] else "out of use: ") + gpu["reason"]
    return [str(gpu["index"]), model, f"{gpu['tpcs_granted']}/{gpu['tpcs']}", granted, *told, health]


def _unit(value: int, unit: str) -> str:
    return f"{value}{unit}" if value >= 0 else NOT_TOLD


def _notes(gpu: Report) -> list[str]:
    clock = gpu.get("clock")
    locked = [f"clocks locked to at most {clock[0]} of {clock[1]} MHz (docs/power.md)"] if clock else []
    return locked + (list(gpu["reading"]["notes"]) if gpu["reading"] else [])


def _held_row(host: str, gpu: Report, grant: Report, now: float) -> list[str]:
    tpcs = f"{len(grant['tpcs'])}" + (" (whole)" if grant["whole"] else f" ({spans(grant['tpcs']) or 'stands still'})")
    tpcs += f", {len(grant['lent'])} on loan" if grant["lent"] else ""
    held = grant["mechanism"] or NOT_TOLD
    where = [host, str(gpu["index"]), tpcs, show_size(grant["memory"]), held]
    return [grant["user"], grant["kernel"][:NAME], str(grant["cell"]), *where, lasted(now - grant["since"])]


def _process_rows(host: str, gpu: Report) -> list[list[str]]:
    """Processes on a real device: what is there, granted or not."""
    rows = []
    for process in gpu["reading"]["processes"] if gpu["reading"] else ():
        memory = show_size(process["memory"]) if process["memory"] >= 0 else NOT_TOLD
        whose = "nobody here" if not process["kernel"] else f"{process['owner']}, kernel {process['kernel'][:NAME]}"
        rows.append([str(process["pid"]), host, str(gpu["index"]), memory, whose])
    return rows


LEFT = {
    "warm": "on the GPU",
    "offload": "on the GPU: what offload leaves",
    "checkpoint": "in host memory: a checkpoint",
    "restart": "on the GPU: its process is being ended",
}


def _left_row(host: str, gpu: Report, left: Mapping[str, Any]) -> list[str]:
    """What an idle notebook's process has, which counts until somebody needs the room."""
    where = [host, str(gpu["index"]), show_size(left["memory"])]
    return [left["owner"], left["kernel"][:NAME], str(left["replica"]), *where, LEFT.get(left["tier"], left["tier"])]


def _waiting_row(one: Report, now: float) -> list[str]:
    best = min(one["queues"], key=lambda queue: (queue["position"], queue["host"]))
    estimates = [queue["estimate"] for queue in one["queues"] if queue["estimate"] >= 0]
    about = f", about {lasted(min(estimates))} more" if estimates else ""
    others = f" and {len(one['queues']) - 1} more" if len(one["queues"]) > 1 else ""
    place = f"{best['position']} on {best['host']}{others}{about}"
    waited = lasted(now - one["since"])
    return [one["user"], one["kernel"][:NAME], str(one["cell"]), asks(one["asks"]), waited, place, best["reason"]]


def asks(resources: Mapping[str, Any]) -> str:
    """`2 GPUs`, `16 TPCs, 20G, H100`."""
    count = resources.get("gpus", 0)
    what = f"{count} GPU{'s' if count > 1 else ''}" if count else f"{resources.get('tpcs', 0)} TPCs"
    memory = [show_size(resources["memory"])] if resources.get("memory") else []
    model = [resources["model"]] if resources.get("model") else []
    return ", ".join([what, *memory, *model])


def spans(numbers: Iterable[int]) -> str:
    """`0-3,8`: neighbours together."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ",".join("-".join(map(str, span)) for span in found)


def lasted(seconds: float) -> str:
    """`4 s`, `12:05`, `3:12:05`. Clocks of two machines differ a little: never less than nothing."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    clock = f"{rest // 60:02d}:{rest % 60:02d}"
    return f"{hours}:{clock}" if hours else clock.removeprefix("0")
