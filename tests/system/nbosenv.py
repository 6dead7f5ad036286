"""Where a running `nbos up` can be entered from outside: as its status tells, and as a Jupyter Server's
environment does.

Everything that tests and benchmarks know about the form of `nbos status --json` stands here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager

import nbos_provisioner
from nbos_cluster.etcd import TLSFiles
from tests.system.hubclient import Hub, eventually

DISPLAY_NAME = "Python 3 (NBOS)"
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """For a process that must import this source tree, not an NBOS installed elsewhere, and belongs to no
    hub.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("JUPYTERHUB_")}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "PATH": binaries}


def nbos_status(state_dir: Path) -> dict[str, Any]:
    """`nbos status --json` of the cluster in this state directory."""
    command = [sys.executable, "-m", "nbos.cli", "status", "--state-dir", str(state_dir), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-2000:]}")
    status: dict[str, Any] = json.loads(done.stdout)
    return status


def entered(state_dir: Path) -> Hub:
    """The hub of the cluster in this state directory, with the token file that its status names."""
    status = nbos_status(state_dir)
    return Hub(status["hub_url"].rstrip("/"), Path(status["token_file"]).read_text().strip())


def etcd_of(state_dir: Path) -> tuple[list[str], TLSFiles]:
    """Where etcd is, and the certificate of `nbos up`: for reading what stands in it."""
    etcd = nbos_status(state_dir)["etcd"]
    files = TLSFiles(*(Path(etcd[name]) for name in ("ca", "cert", "key")))
    return list(etcd["endpoints"]), files


@dataclass(frozen=True)
class Replica:
    index: int
    host: str
    pid: int
    role: str
    applied: int
    state: str


async def model(hub: Hub, kernel: str) -> dict[str, Any]:
    """The gateway's KernelModel."""
    found: dict[str, Any] = await hub.service("GET", f"nbos/api/kernels/{kernel}")
    return found


async def replicas(hub: Hub, kernel: str) -> list[Replica]:
    return [
        Replica(m["index"], m["host"], m["pid"], m["role"], m["applied"], m["state"])
        for m in (await model(hub, kernel))["members"]
    ]


async def executor(hub: Hub, kernel: str) -> Replica:
    """The replica that ran the last cell; it has a process."""
    return next(r for r in await replicas(hub, kernel) if r.role == "executor" and r.pid)


async def settled(hub: Hub, kernel: str, timeout: float = 30.0) -> list[Replica]:
    """Wait until every replica is ready and has applied all that is committed."""

    seen = "nothing was told of them"

    async def all_there() -> list[Replica] | None:
        nonlocal seen
        now = await model(hub, kernel)
        found = await replicas(hub, kernel)
        seen = f"last {now['last']}, {found}"
        done = [r for r in found if r.state == "ready" and r.applied >= now["last"]]
        return found if len(done) == now["replicas"] else None

    try:
        return await eventually(all_there, f"all replicas of kernel {kernel} are ready and caught up", timeout)
    except TimeoutError as err:
        raise TimeoutError(f"{err}: {seen}") from None


async def kernel_environment(hub: Hub, user: str, replicas: int = 3) -> dict[str, str]:
    """What the provisioner finds in the environment of a Jupyter Server of `user`, with a token of that
    user.
    """
    await hub.add_user(user)
    env = {
        "NBOS_GATEWAY_URL": f"{hub.url.rstrip('/')}/services/nbos/",
        "NBOS_REPLICAS": str(replicas),
        "NBOS_RESOURCES": "{}",
        "JUPYTERHUB_API_TOKEN": await hub.user_token(user),
        "JUPYTERHUB_USER": user,
        # The server's extension adds the same folder; Jupyter looks for `kernels` below it.
        "JUPYTER_PATH": str(Path(nbos_provisioner.__file__).parent),
    }
    return env


def kernelspec_name(env: Mapping[str, str]) -> str:
    """The name of the kernelspec "Python 3 (NBOS)", looked for as a process with this environment would."""
    finder = KernelSpecManager()
    extra = [str(Path(path) / "kernels") for path in env.get("JUPYTER_PATH", "").split(os.pathsep) if path]
    finder.kernel_dirs = [*extra, *finder.kernel_dirs]
    specs = finder.get_all_specs()
    for name, entry in specs.items():
        if entry["spec"]["display_name"] == DISPLAY_NAME:
            return str(name)
    raise LookupError(f"no kernelspec {DISPLAY_NAME!r} among {sorted(specs)} in {finder.kernel_dirs}")


def replica_pid(status: dict[str, Any], kernel: str, role: str) -> int:
    """The process id that `nbos status --json` gives for the replica with this role."""
    found = next(k for k in status["kernels"] if k["kernel_id"] == kernel)
    return next(int(m["pid"]) for m in found["members"] if m["role"] == role)
