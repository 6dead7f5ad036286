"""`nbos status`: what runs, as a table for people or JSON for programs. Asks the gateway; reads nothing
else."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbos_spawner.sizes import show_size

from .columns import columns
from .state import StateDir


class NotRunning(RuntimeError):
    """Nothing answers; says what was asked and the way out."""


@dataclass(frozen=True)
class Cluster:
    """A cluster on other machines: its hub's address, and a file with a JupyterHub token."""

    url: str
    token_file: Path


def status(state: StateDir, *, as_json: bool, cluster: Cluster | None = None) -> int:
    """Print it; the exit status: 0, or 1 when nothing answers."""
    try:
        report = collect(state, cluster)
    except NotRunning as err:
        if as_json:
            print(json.dumps({"running": False, "state_dir": str(state.path), "error": str(err)}, indent=2))
        print(f"nbos status: {err}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if as_json else "\n".join(table(report)))
    return 0


def collect(state: StateDir, cluster: Cluster | None = None) -> dict[str, Any]:
    """The gateway's status with the place it came from: of `cluster`, else of the `nbos up` in `state`. Raises
    NotRunning."""
    if cluster is not None:
        hub, token = cluster.url.rstrip("/") + "/", _token(cluster.token_file)
        api = f"{hub}services/nbos/api"
        found = _get(f"{api}/status", token, running=True)
        return {"running": True, "hub_url": hub, "api_url": api, "token_file": str(cluster.token_file), **found}
    info = state.info()
    if not info:
        raise NotRunning(f"there is no NBOS in {state.path}; start one with `nbos up`, or name it with --state-dir")
    found = _get(f"{info['api_url']}/status", _token(state.token_file), running=state.in_use())
    return {
        "running": True,
        "hub_url": info["hub_url"],
        "api_url": info["api_url"],
        "token_file": info["token_file"],
        "state_dir": str(state.path),
        "etcd": info["etcd"],
        "pid": info["pid"],
        **found,
    }


def _token(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError as err:
        raise NotRunning(f"the token file {file} cannot be read: {err.strerror}") from err


def _get(url: str, token: str, *, running: bool) -> dict[str, Any]:
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"})
    # Never through a proxy of the environment: the address is this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=15) as reply:
            return dict(json.load(reply))
    except urllib.error.HTTPError as err:
        if err.code in (502, 503, 504):
            raise NotRunning(f"the gateway at {url} does not answer yet ({err.code}: {message_of(err)})") from err
        raise NotRunning(f"{url} refuses with {err.code}: {message_of(err)}; look into the logs") from err
    except (OSError, ValueError) as err:
        way_out = "it is starting, or its log says why" if running else "start it with `nbos up`"
        raise NotRunning(f"the gateway at {url} does not answer ({err}); {way_out}") from err


def message_of(err: urllib.error.HTTPError) -> str:
    """What the gateway says about a refusal."""
    try:
        return str(json.load(err)["message"])
    except (ValueError, KeyError, TypeError):
        return str(err.reason)


def table(report: dict[str, Any]) -> list[str]:
    """The lines for people."""
    lines = [f"JupyterHub  {report['hub_url']}    dashboard  {report['hub_url']}services/nbos/", ""]
    lines += columns(["HOST", "REPLICAS", "GPU", "TPCS", "MEMORY", "STATE"], _host_rows(report["hosts"]))
    lines += [f"host {name} is away; its replicas are being placed elsewhere" for name in report["away"]]
    lines += [_warm(host["name"], warm) for host in report["hosts"] for warm in host["warm"]]
    grants = [_grant(grant) for host in report["hosts"] for grant in host["grants"]]
    lines += ["", *grants] if grants else ["", "no GPU is granted"]
    lines += [_ticket(ticket) for ticket in report["queues"]]
    for kernel in report["kernels"]:
        lines += ["", *_kernel(kernel)]
    if not report["kernels"]:
        lines += ["", "no kernel runs"]
    return lines


def _host_rows(hosts: Iterable[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for host in hosts:
        name = host["name"] + (" (draining)" if host["draining"] else "")
        count = f"{host['replicas']}/{host['max_replicas']}"
        for device in host["devices"] or [None]:
            rows.append([name, count, *(_device(device) if device else ["none", "", "", ""])])
            name = count = ""
    return rows


def _device(device: dict[str, Any]) -> list[str]:
    return [
        f"{device['index']}: {device['model']}",
        f"{device['tpcs_granted']}/{device['tpcs']}",
        f"{show_size(device['memory_granted'])}/{show_size(device['memory'])}",
        "healthy" if device["healthy"] else device["reason"] or "not healthy",
    ]


def _warm(host: str, warm: dict[str, Any]) -> str:
    note = f": {warm['note']}" if warm["note"] else ""
    image = f" of {warm['image']}" if warm["image"] else ""
    ahead = f"; imported ahead: {', '.join(warm['modules'])}" if warm["modules"] else ""
    refused = "".join(f"\n  not imported ahead there: {name}: {why}" for name, why in warm["refused"].items())
    return f"kept warm on {host}: {warm['ready']} of {warm['wanted']} replicas{image}{note}{ahead}{refused}"


def _grant(grant: dict[str, Any]) -> str:
    shares = ", ".join(
        f"GPU {s['index']} ({'whole' if s['whole'] else str(len(s['tpcs'])) + ' TPCs'}, {show_size(s['memory'])})"
        for s in grant["shares"]
    )
    return f"granted on {grant['host']}: {shares} to {grant['owner']}, kernel {grant['kernel']}, cell {grant['n']}"


def _ticket(ticket: dict[str, Any]) -> str:
    return (
        f"waiting on {ticket['host']}, position {ticket['position']}: {ticket['owner']}, kernel {ticket['kernel']}, "
        f"cell {ticket['n']}: {ticket['reason']}"
    )


def _kernel(kernel: dict[str, Any]) -> list[str]:
    notebook = f"notebook {kernel['owner']}/{kernel['notebook'].lstrip('/')}  " if kernel["notebook"] else ""
    head = (
        f"kernel {kernel['kernel_id']}  owner {kernel['owner']}  {notebook}epoch {kernel['epoch']}  "
        f"last committed {kernel['last']}"
    )
    rows = [
        [str(m["index"]), m["host"], str(m["pid"] or ""), m["state"], m["role"], _applied(m, kernel), m["reason"]]
        for m in kernel["members"]
    ]
    lost = [f"  not replicated: {name}: {reason}" for name, reason in sorted(kernel["lost"].items())]
    move = kernel["move"]
    moves = [f"  moving {move['source']} to {move['to_host']}: {move['progress']}"] if move else []
    table = columns(["  REPLICA", "HOST", "PID", "STATE", "ROLE", "APPLIED", ""], _indent(rows))
    return [head, *table, *moves, *lost]


def _applied(member: dict[str, Any], kernel: dict[str, Any]) -> str:
    """How far it is in the log, and what it lacks."""
    behind = kernel["last"] - member["applied"]
    return (
        f"{member['applied']} ({behind} behind)"
        if member["state"] == "ready" and behind > 0
        else f"{member['applied']}"
    )


def _indent(rows: list[list[str]]) -> list[list[str]]:
    return [[f"  {row[0]}", *row[1:]] for row in rows]
