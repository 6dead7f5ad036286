"""`nbos doctor`: what this machine has and lacks, in plain words, each with the way out.

Every check is a function that returns a Finding and changes nothing; it is 'bad' only when `nbos up` could
not work.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from .etcdserver import NoEtcd, find_etcd
from .ports import holder, is_free
from .state import SOCKET_ROOM, StateDir
from .strays import daemon_lives, find_strays, remove_strays

Level = Literal["good", "note", "bad"]
_MARKS: dict[Level, str] = {"good": "ok  ", "note": "note", "bad": "BAD "}

PACKAGES = {
    "jupyterhub": "hub",
    "configurable_http_proxy": "hub",
    "jupyter_server": "server",
    "jupyterlab": "server",
    "jupyter_client": "server",
    "ipykernel": "kernel",
    "cloudpickle": "kernel",
    "aetcd": "cluster",
    "grpc": "cluster",
    "msgspec": "cluster",
    "cryptography": "cluster",
    "psutil": "daemon",
    "pynvml": "daemon",
}
"""What `nbos up` imports, and the extra of the package that brings it."""

ROOM = 2 << 30
MEMORY = 2 << 30


@dataclass(frozen=True)
class Finding:
    level: Level
    text: str


def doctor(state: StateDir, port: int, clean: bool = False) -> int:
    """Print all findings; the exit status: 1 when something is bad. clean: remove stray containers as well."""
    findings = [*examine(state, port), *check_strays(clean)]
    for finding in findings:
        print(f"[{_MARKS[finding.level]}] {finding.text}")
    bad = sum(finding.level == "bad" for finding in findings)
    print(f"\n{bad} problem{'s' * (bad != 1)} to solve before `nbos up` works" if bad else "\n`nbos up` can run here")
    return 1 if bad else 0


def examine(state: StateDir, port: int) -> list[Finding]:
    checks: list[Callable[[], Finding]] = [
        lambda: check_python(sys.version_info[:3]),
        lambda: check_user(os.getuid()),
        lambda: check_packages(PACKAGES, _has),
        lambda: check_curve(_zmq_has_curve),
        check_etcd,
        lambda: check_port(state, port),
        lambda: check_state_dir(state),
        lambda: check_own_certs(state),
        lambda: check_disk(state),
        check_memory,
        check_gpus,
        lambda: check_docker(shutil.which("docker"), Path("/var/run/docker.sock")),
    ]
    return [check() for check in checks]


def check_python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("bad", f"Python {text}: NBOS needs 3.11 or later; make a virtual environment with a newer one")
    return Finding("good", f"Python {text}")


def check_user(uid: int) -> Finding:
    if uid == 0:
        return Finding("note", "you are root: notebooks would run as root, too; better use an ordinary user")
    return Finding("good", "you are an ordinary user; nothing here needs root")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check_packages(needed: dict[str, str], has: Callable[[str], bool]) -> Finding:
    missing = [module for module in needed if not has(module)]
    if missing:
        extras = ",".join(sorted({needed[module] for module in missing}))
        return Finding("bad", f"Python packages are missing ({', '.join(missing)}): pip install 'nbos[{extras}]'")
    hub = importlib.metadata.version("jupyterhub")
    if int(hub.partition(".")[0]) < 6:
        return Finding("bad", f"JupyterHub {hub}: NBOS needs 6.1 or later; pip install 'jupyterhub>=6.1'")
    return Finding("good", f"all Python packages are there (JupyterHub {hub})")


def _zmq_has_curve() -> bool:
    import zmq

    return bool(zmq.has("curve"))


def check_curve(has: Callable[[], bool]) -> Finding:
    """Messages to and from kernels are encrypted, or not sent at all."""
    try:
        if has():
            return Finding("good", "ZeroMQ can encrypt (CurveZMQ): messages of kernels never travel in clear")
    except ImportError:
        return Finding("bad", "pyzmq is missing: pip install 'nbos[server]'")
    return Finding("bad", "this ZeroMQ has no CurveZMQ, and kernels send nothing in clear: pip install --force pyzmq")


def check_etcd() -> Finding:
    try:
        etcd = find_etcd()
    except NoEtcd as err:
        return Finding("bad", str(err))
    if etcd.warning:
        return Finding("note", etcd.warning)
    if etcd.version < (3, 4, 0):
        return Finding("bad", f"etcd {etcd.text} ({etcd.path}) is too old; install 3.4 or later")
    return Finding("good", f"etcd {etcd.text} ({etcd.path})")


def check_port(state: StateDir, port: int) -> Finding:
    if is_free("127.0.0.1", port):
        return Finding("good", f"port {port} is free")
    if state.path.exists() and state.in_use() and f":{port}/" in state.info().get("hub_url", ""):
        return Finding("good", f"port {port} is used by the `nbos up` that runs on {state.path}")
    return Finding("bad", f"port {port} is in use by {holder(port)}; end that, or use: nbos up --port {port + 10}")


def check_state_dir(state: StateDir) -> Finding:
    path = state.path
    if not path.exists():
        parent = _existing(path)
        if not os.access(parent, os.W_OK | os.X_OK):
            return Finding("bad", f"{path} cannot be made ({parent} is not yours to write); choose another --state-dir")
        return Finding("good", f"the state directory {path} will be made by `nbos up`")
    found = path.stat()
    if found.st_uid != os.getuid():
        return Finding("bad", f"{path} belongs to user {found.st_uid}, not to you; choose another --state-dir")
    if stat.S_IMODE(found.st_mode) & 0o077:
        return Finding("bad", f"{path} holds secrets and others may read it; run: chmod 700 {path}")
    open_secrets = [
        f
        for f in (state.token_file, state.password_file, state.admin_password_file, state.secrets_file)
        if f.exists() and stat.S_IMODE(f.stat().st_mode) & 0o077
    ]
    if open_secrets:
        return Finding("bad", f"others may read {open_secrets[0]}; run: chmod 600 {open_secrets[0]}")
    if len(os.fsencode(state.host("host-1") / "run")) > SOCKET_ROOM:
        return Finding(
            "note", f"{path} is too long for Unix sockets; they will lie in {state.run_dir('host-1').parent}"
        )
    return Finding("good", f"the state directory {path} is yours alone")


def check_own_certs(state: StateDir) -> Finding:
    from .certdoctor import check_own_certs

    return check_own_certs(state)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def check_disk(state: StateDir) -> Finding:
    free = shutil.disk_usage(_existing(state.path)).free
    text = f"{free >> 20:,} MB free where the state directory is"
    if free < ROOM:
        return Finding("bad", f"only {text}; logs and blobs of kernels need at least {ROOM >> 20:,} MB")
    return Finding("good", text)


def check_memory() -> Finding:
    free = psutil.virtual_memory().available
    text = f"{free >> 20:,} MB of memory available"
    if free < MEMORY:
        return Finding("note", f"only {text}; three replicas of a kernel with torch need about 2,000 MB: use fewer")
    return Finding("good", text)


def check_gpus() -> Finding:
    from gpu_daemon.inventory import NVMLState, look

    found = look()
    if found.state is NVMLState.WORKS:
        well = [device for device in found.devices if device.healthy]
        names = ", ".join(sorted({device.model for device in well})) or "none that can be granted"
        driver = f", driver {found.driver}" if found.driver else ""
        ill = "".join(f"; GPU {d.index} cannot be granted: {d.reason}" for d in found.devices if not d.healthy)
        return Finding("note" if ill else "good", f"{len(well)} NVIDIA GPU(s): {names}{driver}{ill}")
    detail = f" ({found.detail})" if found.detail else ""
    return Finding("note", f"{found.state.value}{detail}; `nbos up` simulates GPUs")


def check_docker(binary: str | None, path: Path) -> Finding:
    if binary is None:
        return Finding("note", "no Docker: `nbos up` needs none; the cluster form does")
    trouble = _docker_trouble(path)
    if trouble:
        return Finding("note", f"Docker is installed, but {trouble}; `nbos up` needs none, the cluster form does")
    return Finding("good", f"Docker ({binary}), its daemon answers at {path}")


def _docker_trouble(path: Path) -> str:
    """Why Docker's daemon cannot be used through its socket, with the way out; '' when it answers."""
    start = "start it (systemctl start docker, or: dockerd)"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(2.0)
            client.connect(str(path))
            client.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            answer = client.recv(64)
    except FileNotFoundError:
        return f"its daemon does not run: {path} is not there; {start}"
    except ConnectionRefusedError:
        return f"its daemon does not run: nobody listens on {path}; {start}"
    except PermissionError:
        return f"{path} is not yours to use; become a member of its group (usermod -aG docker NAME)"
    except OSError as err:
        return f"its daemon does not answer on {path} ({err}); look at its log"
    return "" if b" 200 " in answer else f"what listens on {path} does not answer like Docker; look at its log"


def check_strays(clean: bool) -> list[Finding]:
    """Replicas' containers that no daemon owns. Nothing to say where Docker or its Python package is not there."""
    try:
        import docker
        from docker.errors import DockerException
    except ImportError:
        return [Finding("note", "--clean needs the package docker: pip install 'nbos[docker]'")] if clean else []
    try:
        api = docker.from_env(version="auto").api
        strays = find_strays(api, daemon_lives)
        if clean:
            remove_strays(api, strays)
    except (DockerException, OSError) as err:
        return [Finding("note", f"stray containers cannot be looked for or removed: {err}")] if clean else []
    if not strays:
        return []
    names = "".join(f"\n         {stray.kind} {stray.name} ({stray.about})" for stray in strays)
    if clean:
        return [Finding("good", f"removed what daemons that do not run any more left in Docker:{names}")]
    way_out = "if they will not be started again, run: nbos doctor --clean"
    return [Finding("note", f"daemons that do not run have left in Docker ({way_out}):{names}")]
