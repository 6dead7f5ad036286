"""What a replica's container is made of: a launch and the site's options in, the Engine API's own JSON out. No IO.

Guarantees, whatever the options: no capability, no new privileges, no process more than `pids`; of the host's files
only the folder with the replica's own socket and connection file (read-only), and the volumes that the site named; of
the daemon's environment nothing. Where replicas are to reach the host's MPS daemon (`mps`: one trust domain), its pipe
folder and the host's /dev/shm come in addition, and nothing else of the host's. The name is made from host and replica,
so that the Engine itself refuses a second one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpu_daemon import container_check
from gpu_daemon.ports import numbers
from gpu_daemon.runtime import Launch, RuntimeFailed
from nbos_cluster.records import Device, Ports

INSIDE = "/run/nbos"
"""Where the replica's own folder is mounted."""

CONNECTION = "/tmp/nbos-connection.json"
SPARE_SOCKET = "w"
"""In that folder: where a container that was started ahead is told what to be."""

TAKEN = "taken"
"""A file there, once it is to become a replica."""

SHM = "/dev/shm"
LABEL = "nbos."
ROOM = "." * 512
LOG = {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}}

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_OWNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,127}")


@dataclass(frozen=True)
class DockerOptions:
    """The site's choices; `gpu_daemon.docker_config` describes each. Sizes are bytes, 0 = no bound."""

    image: str = "nbos/kernel"
    pull: Literal["missing", "always", "never"] = "missing"
    python: str = "python3"
    user: str = "1000:1000"
    home: str = "/home/jovyan"
    volumes: Mapping[str, str | Mapping[str, str]] = field(default_factory=lambda: {"nbos-home-{username}": "{home}"})
    environment: Mapping[str, str] = field(default_factory=dict)
    read_only: bool = True
    tmp: int = 1 << 30
    shm: int = 1 << 30
    memory: int = 0
    cpus: float = 0.0
    pids: int = 4096
    gpus: Literal["auto", "nvidia", "cdi", "none"] = "auto"
    network: str = ""
    internet: bool = True
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ("169.254.0.0/16",)
    walls: Literal["required", "auto", "off"] = "required"
    engine: str = ""
    mps: str = ""
    """Pipe folder of the host's MPS daemon, '' where replicas do not reach it. Not an option of this section: it
    follows from `Slicing`."""


@dataclass(frozen=True)
class Site:
    """Whose containers these are. run_dir: of the daemon; tells whether it still lives."""

    cluster: str
    host: str
    run_dir: str

    @property
    def labels(self) -> dict[str, str]:
        return {f"{LABEL}cluster": self.cluster, f"{LABEL}host": self.host}

    @property
    def network(self) -> str:
        return f"nbos-{self.cluster}-{self.host}"

    @property
    def interface(self) -> str:
        """Name of the network's bridge: Linux takes 15 characters."""
        return f"nb{hashlib.sha256(self.network.encode()).hexdigest()[:12]}"

    def name(self, folder: str) -> str:
        """Of the container of the replica with this folder."""
        return f"nbos-{self.cluster}-{self.host}-{folder}"


def container(
    launch: Launch, options: DockerOptions, site: Site, user: str, network: str, devices: Iterable[Device]
) -> dict[str, Any]:
    """The body of `POST /containers/create`. user: 'uid:gid'. Raises RuntimeFailed for an owner that fits no path."""
    home = fill(options.home, launch.owner)
    mounts = [*_volumes(options, launch.owner, home), _own(launch), *_mps(options)]
    exposed: dict[str, Any] = {f"{port}/tcp": {} for port in numbers(launch.ports).values()}
    start = launch.argv(options.python, f"{INSIDE}/s", CONNECTION)
    return {
        "Image": launch.image or options.image,
        "Entrypoint": [options.python, f"{INSIDE}/start.py", launch.cwd or home],
        "Cmd": list(start),
        "User": user,
        "WorkingDir": "/",
        "Hostname": f"{launch.kernel[:8]}-{launch.index}",
        "Env": [f"{k}={v}" for k, v in _environment(launch, options, home).items()],
        "Labels": _labels(launch, site),
        "ExposedPorts": exposed,
        "HostConfig": {
            **_limits(launch, options),
            **_walls(options, home, mounts, user),
            "Mounts": mounts,
            "NetworkMode": network,
            "PortBindings": {name: [{"HostIp": launch.ip, "HostPort": name.partition("/")[0]}] for name in exposed},
            "DeviceRequests": device_requests(options.gpus, devices),
            "Init": True,
            "LogConfig": LOG,
            "RestartPolicy": {"Name": "no"},
        },
    }


@dataclass(frozen=True, order=True)
class Kind:
    """What a container that waits can become: a replica of this image, of this owner; owner '': of anybody."""

    image: str
    owner: str = ""

    def __str__(self) -> str:
        return f"{self.image} for {self.owner}" if self.owner else self.image


def kind_of(image: str, owner: str, options: DockerOptions) -> Kind:
    """owner: of the kernel. It counts where mounts, home or user depend on it: these cannot change later."""
    places = [p if isinstance(p, str) else p["bind"] for p in options.volumes.values()]
    texts = (options.home, *options.volumes, *places)
    depends = options.user == "owner" or any("{owner}" in text or "{username}" in text for text in texts)
    return Kind(image, owner if depends else "")


@dataclass(frozen=True)
class Place:
    """Where a container waits: the name of its slot, the slot's folder, and the ports that are published for it."""

    slot: str
    folder: Path
    ip: str
    ports: Ports


def waiting(
    kind: Kind,
    place: Place,
    options: DockerOptions,
    site: Site,
    user: str,
    network: str,
    devices: Iterable[Device],
    modules: Sequence[str],
) -> dict[str, Any]:
    """The body for a container that is started ahead: that of a replica, as far as it does not depend on the kernel."""
    launch = Launch("", 0, 0, kind.owner, place.folder, {}, place.ip, place.ports, image=kind.image)
    body = container(launch, options, site, user, network, devices)
    # The last argument is room for the command line that it shows later (nbos_kernel.warm.title).
    command = [options.python, "-m", "nbos_kernel.warm", "--contained", f"{INSIDE}/{SPARE_SOCKET}", *modules, ROOM]
    body |= {
        "Entrypoint": [options.python, f"{INSIDE}/start.py", container_check.WAIT],
        "Cmd": command,
        "Hostname": place.slot,
    }
    said = {
        "image": kind.image,
        "owner": kind.owner,
        "run-dir": site.run_dir,
        "folder": place.slot,
        "ports": ",".join(str(port) for port in numbers(place.ports).values()),
        "warm": _digest(body),
    }
    return {**body, "Labels": {**site.labels, **{LABEL + name: value for name, value in said.items()}}}


def ports_of(labels: Mapping[str, str]) -> Ports | None:
    """Of a container that was started ahead; None: of another one."""
    told = labels.get(f"{LABEL}ports", "").split(",")
    names = Ports.__struct_fields__
    if len(told) != len(names) or not all(port.isdigit() for port in told):
        return None
    return Ports(**dict(zip(names, map(int, told), strict=True)))


def _digest(body: Mapping[str, Any]) -> str:
    """Differs when the site's options do: not by what each container has of its own."""
    host = {name: value for name, value in body["HostConfig"].items() if name not in ("PortBindings", "Mounts")}
    mounts = [mount for mount in body["HostConfig"]["Mounts"] if mount["Target"] != INSIDE]
    own = ("ExposedPorts", "Labels", "HostConfig", "Hostname")
    rest = {name: value for name, value in body.items() if name not in own}
    return hashlib.sha256(json.dumps([rest, host, mounts], sort_keys=True).encode()).hexdigest()[:16]


def _limits(launch: Launch, options: DockerOptions) -> dict[str, Any]:
    memory = launch.memory or options.memory
    return {
        "Memory": memory,
        # As much as Memory: no swap on top of it.
        "MemorySwap": memory,
        "NanoCpus": int(options.cpus * 1e9),
        "PidsLimit": options.pids,
        "ShmSize": options.shm,
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
        # When the host's memory runs out, the replica goes before the daemon that would start it again.
        "OomScoreAdj": 500,
    }


def _walls(options: DockerOptions, home: str, mounts: list[dict[str, Any]], user: str) -> dict[str, Any]:
    tmpfs = {"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={options.tmp or '50%'}"}
    kept = any(home == m["Target"] or home.startswith(m["Target"].rstrip("/") + "/") for m in mounts)
    if options.read_only and not kept:
        uid, _, gid = user.partition(":")
        tmpfs[home] = f"rw,exec,nosuid,nodev,mode=0700,uid={uid},gid={gid or uid},size={options.tmp or '50%'}"
    return {
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "Privileged": False,
        "ReadonlyRootfs": options.read_only,
        "IpcMode": "private",
        "Tmpfs": tmpfs,
    }


def _environment(launch: Launch, options: DockerOptions, home: str) -> dict[str, str]:
    return {"HOME": home, **options.environment, **launch.env}


def _labels(launch: Launch, site: Site) -> dict[str, str]:
    said = {
        "kernel": launch.kernel,
        "replica": launch.index,
        "incarnation": launch.incarnation,
        "owner": launch.owner,
        "run-dir": site.run_dir,
        "folder": launch.folder.name,
    }
    return {**site.labels, **{LABEL + name: str(value) for name, value in said.items()}}


def _own(launch: Launch) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(launch.folder / "d"), "Target": INSIDE, "ReadOnly": True}


def _mps(options: DockerOptions) -> list[dict[str, Any]]:
    """Clients of MPS talk to its daemon through the pipes, and to its server through files in /dev/shm."""
    folders = [options.mps, SHM] if options.mps else []
    return [{"Type": "bind", "Source": folder, "Target": folder, "ReadOnly": False} for folder in folders]


def _volumes(options: DockerOptions, owner: str, home: str) -> list[dict[str, Any]]:
    mounts = []
    for source, place in options.volumes.items():
        target, mode = (place, "rw") if isinstance(place, str) else (place["bind"], place.get("mode", "rw"))
        filled = fill(source, owner)
        mounts.append(
            {
                "Type": "bind" if filled.startswith("/") else "volume",
                "Source": filled,
                "Target": fill(target.replace("{home}", home), owner),
                "ReadOnly": mode == "ro",
            }
        )
    return mounts


def fill(template: str, owner: str) -> str:
    """`template` with {username} (made safe, still different for different owners) and {owner} (as it is).

    Raises RuntimeFailed when {owner} is asked for and could lead to another place.
    """
    if "{owner}" in template and (not _OWNER.fullmatch(owner) or ".." in owner):
        raise RuntimeFailed(
            f"the user name {owner!r} cannot stand in the path {template!r}; the administrator may use {{username}} "
            "there instead of {owner}"
        )
    return template.replace("{owner}", owner).replace("{username}", safe_name(owner))


def safe_name(owner: str) -> str:
    """`owner` when it may name a volume, else what is left of it with a hash: two owners never share a name."""
    if _NAME.fullmatch(owner) and "---" not in owner:
        return owner
    plain = re.sub(r"[^a-z0-9]+", "-", owner.lower()).strip("-")[:32] or "user"
    return f"{plain}---{hashlib.sha256(owner.encode()).hexdigest()[:12]}"


def device_requests(gpus: str, devices: Iterable[Device]) -> list[dict[str, Any]]:
    """All of this host's real GPUs: which of them a cell may use, its grant says (a kernel lives longer)."""
    # One that could not even be counted is granted to nobody, and the toolkit may not find it.
    real = [device for device in devices if device.kind == "nvml" and device.tpcs]
    if not real or gpus == "none":
        return []
    if gpus == "cdi":
        # The toolkit names a MIG instance by its UUID when told to (nvidia-ctk cdi generate).
        names = [device.uuid if device.parent else str(device.index) for device in real]
        return [{"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={name}" for name in names]}]
    return [
        {
            "Driver": "nvidia",
            "DeviceIDs": [device.uuid for device in real],
            "Capabilities": [["gpu", "compute", "utility"]],
        }
    ]
