"""What `nbos up` runs, as plain data: options, ports and paths in, commands and environments out. Starts
nothing."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from nbos_cluster import access, certs
from nbos_cluster.etcd import TLSFiles
from nbos_cluster.records import Device

from .etcdserver import EtcdChoice, etcd_command
from .places import child_environment, embedded_config
from .state import StateDir, write_json
from .supervisor import Child

PORTS = ("etcd", "etcd_peer", "hub", "proxy_api", "gateway")


@dataclass(frozen=True)
class UpOptions:
    """What the person asked of `nbos up`. gpus, tpcs and gpu_memory are per host, for simulated GPUs."""

    ip: str = "127.0.0.1"
    port: int = 8000
    hosts: int = 3
    gpus: int = 2
    tpcs: int = 66
    gpu_memory: int = 80 << 30
    gpu_model: str = "Simulated H100"
    admin: str = "admin"
    simulate: bool = False
    runtime: str = "process"
    image: str = "nbos/kernel"
    """Of kernels whose users chose none; runtime docker only."""
    warm: int = 1
    learn: bool = True
    """Replicas that each host has started ahead, at least; 0: none. Runtime process only, as what follows."""
    preload: tuple[str, ...] = ()
    """Modules that they have imported."""
    limits: dict[str, Any] = field(default_factory=dict)
    """What users may ask for: the table of configs/jupyterhub_config.py; empty: as it stands there."""
    sharing: dict[str, Any] = field(default_factory=dict)
    """Who is owed what: options of every daemon (docs/sharing.md)."""
    host_grace: int = 10
    """Seconds a host may be away before its replicas are placed elsewhere."""
    at_a_time: int = 4
    """Replicas that draining hosts move, and that are made anew for lost ones, at the same time."""


@dataclass(frozen=True)
class Layout:
    """One embedded NBOS. devices: this machine's real GPUs, empty for simulated ones."""

    state: StateDir
    options: UpOptions
    ports: dict[str, int]
    etcd: EtcdChoice
    devices: tuple[Device, ...] = ()

    @property
    def hosts(self) -> list[str]:
        return [f"host-{i}" for i in range(1, self.options.hosts + 1)]

    @property
    def url(self) -> str:
        ip = self.options.ip if self.options.ip not in ("0.0.0.0", "", "::") else "127.0.0.1"
        return f"http://{f'[{ip}]' if ':' in ip else ip}:{self.options.port}"

    @property
    def endpoints(self) -> list[str]:
        return [f"127.0.0.1:{self.ports['etcd']}"]

    def tls(self, name: str) -> TLSFiles:
        """The certificate files of the etcd client `name`."""
        folder = self.state.tls
        return TLSFiles(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")

    def make_certificates(self) -> None:
        """A private authority, a certificate for etcd, and one for each process that may speak to it."""
        tls = self.state.tls
        certs.make_ca(tls)
        certs.issue(tls, "etcd", ["127.0.0.1", "localhost"], common=access.MEMBER, server=True)
        certs.issue(tls, "up", common=access.ROOT)
        certs.issue(tls, "gateway", common=access.GATEWAY)
        for host in self.hosts:
            certs.issue(tls, host, common=access.daemon_user(host))

    def devices_of(self, host: str) -> list[str]:
        """UUIDs of the real devices this host has: dealt out one by one, so that none belongs to two."""
        at = self.hosts.index(host)
        return [device.uuid for device in self.devices[at :: len(self.hosts)]]

    def write_settings(self) -> None:
        """The secrets file that JupyterHub's configuration reads, and each daemon's configuration."""
        state, options = self.state, self.options
        settings = {
            "admin": options.admin,
            "user_password": state.secret(state.password_file, 9),
            "admin_password": state.secret(state.admin_password_file, 24),
            "api_token": state.secret(state.token_file, 24),
            "proxy_token": state.secret(state.path / "proxy-token", 24),
            "ip": options.ip,
            "port": options.port,
            "hub_port": self.ports["hub"],
            "proxy_api_port": self.ports["proxy_api"],
        }
        write_json(state.secrets_file, settings)
        for host in self.hosts:
            state.host(host).mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(state.host(host) / "gpu_daemon.json", self.daemon_config(host))

    def daemon_config(self, host: str) -> dict[str, Any]:
        """The configuration file (traitlets) of one host's daemon."""
        tls, options = self.tls(host), self.options
        app: dict[str, Any] = {
            **options.sharing,
            "host": host,
            "address": "127.0.0.1",
            "run_dir": str(self.state.make_run_dir(host)),
            "blob_store": f"file://{quote(str(self.state.path / 'blobs'))}",
            "etcd_endpoints": self.endpoints,
            "etcd_ca": str(tls.ca),
            "etcd_cert": str(tls.cert),
            "etcd_key": str(tls.key),
        }
        mine = self.devices_of(host)
        if mine:
            app |= {"devices": "nvml", "device_uuids": mine}
        elif self.devices:  # fewer GPUs than hosts: this one has none
            app |= {"devices": "simulated", "simulated_devices": 0}
        else:
            app |= {
                "devices": "simulated",
                "simulated_devices": options.gpus,
                "simulated_tpcs": options.tpcs,
                "simulated_memory": str(options.gpu_memory),
                "simulated_model": options.gpu_model,
            }
        return {"GPUDaemon": app, "Warm": self.warm_config(), **self.docker_config(app)}

    def warm_config(self) -> dict[str, Any]:
        count = self.options.warm
        if not count:
            return {"policy": "off"}
        return {
            "keep": count,
            "most": max(4, 2 * count),
            "modules": list(self.options.preload),
            "learn": self.options.learn,
        }

    def docker_config(self, app: dict[str, Any]) -> dict[str, Any]:
        """With replicas in Docker, what stands besides; `app` is told as well. The notebooks' folders are mounted
        where the Jupyter Servers, which are processes of this machine, have them."""
        if self.options.runtime != "docker":
            return {}
        homes = str(self.state.homes / "{owner}")
        app |= {"runtime": "docker", "cluster": f"up-{self.state.mark}"}
        return {
            "Docker": {
                "image": self.options.image,
                "user": f"{os.getuid()}:{os.getgid()}",
                "home": homes,
                "volumes": {homes: homes},
                "walls": "auto",
            }
        }

    def info(self, pid: int) -> dict[str, Any]:
        """What `nbos status` and programs need to know, for nbos.json. No secret: paths of their files
        only."""
        state, tls = self.state, self.tls("up")
        return {
            "pid": pid,
            "hub_url": f"{self.url}/",
            "api_url": f"{self.url}/services/nbos/api",
            "hub_api_url": f"{self.url}/hub/api",
            "token_file": str(state.token_file),
            "admin": self.options.admin,
            "password_file": str(state.password_file),
            "admin_password_file": str(state.admin_password_file),
            "etcd": {
                "endpoints": self.endpoints,
                "version": self.etcd.text,
                "ca": str(tls.ca),
                "cert": str(tls.cert),
                "key": str(tls.key),
            },
            "hosts": {host: {"run_dir": str(state.run_dir(host))} for host in self.hosts},
            "logs": str(state.logs),
        }

    def children(self) -> dict[str, Child]:
        """All processes by name, in the order of their start."""
        port, peer = self.ports["etcd"], self.ports["etcd_peer"]
        etcd = etcd_command(self.etcd, self.state.etcd, self.state.tls, port, peer)
        python = [sys.executable, "-m"]
        found = [self._child("etcd", f"etcd {self.etcd.text}", etcd, self._etcd_env())]
        for host in self.hosts:
            config = str(self.state.host(host) / "gpu_daemon.json")
            found.append(self._child(host, f"{host} (gpu_daemon)", [*python, "gpu_daemon", "--config", config], {}))
        found.append(
            self._child(
                "proxy",
                "the proxy",
                [*python, "nbos_spawner.proxy", *self._proxy_args()],
                {"CONFIGPROXY_AUTH_TOKEN": self.state.secret(self.state.path / "proxy-token", 24)},
            )
        )
        hub = [*python, "jupyterhub", "--config", str(embedded_config())]
        found.append(self._child("hub", "JupyterHub", hub, self._hub_env()))
        return {child.name: child for child in found}

    def _child(self, name: str, label: str, command: list[str], env: dict[str, str]) -> Child:
        env = child_environment(NBOS_STATE=str(self.state.path), **env)
        cwd = self.state.hub if name == "hub" else self.state.path
        return Child(name, label, command, env, cwd, self.state.logs / f"{name}.log")

    def _proxy_args(self) -> list[str]:
        return [
            f"--ip={self.options.ip}",
            f"--port={self.options.port}",
            "--api-ip=127.0.0.1",
            f"--api-port={self.ports['proxy_api']}",
            f"--error-target=http://127.0.0.1:{self.ports['hub']}/hub/error",
            "--log-level=warning",
        ]

    def _hub_env(self) -> dict[str, str]:
        tls = self.tls("gateway")
        limits = {"NBOS_LIMITS": json.dumps(self.options.limits)} if self.options.limits else {}
        return {
            **limits,
            "NBOS_HOST_GRACE": str(self.options.host_grace),
            "NBOS_AT_A_TIME": str(self.options.at_a_time),
            "NBOS_GATEWAY": f"http://127.0.0.1:{self.ports['gateway']}",
            "NBOS_ETCD_ENDPOINTS": ",".join(self.endpoints),
            "NBOS_ETCD_CA": str(tls.ca),
            "NBOS_ETCD_CERT": str(tls.cert),
            "NBOS_ETCD_KEY": str(tls.key),
        }

    def _etcd_env(self) -> dict[str, str]:
        return {"GODEBUG": "madvdontneed=1"}  # give freed memory back at once
