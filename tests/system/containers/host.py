"""A daemon of a test's own whose replicas run in Docker, and a line to them as a router has it."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from gpu_daemon.container_spec import Site
from gpu_daemon.walls import remove_walls
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import KernelSpec, ReplicaRecord
from tests.system.containers.engine import IMAGE, containers, docker
from tests.system.daemon.site import Host, create, kernel_spec, view_of
from tests.system.etcdserver import eventually
from tests.system.fake_daemon import Client


class DockerHost(Host):
    """options: of the section Docker; warm: of the section Warm, nothing is started ahead without."""

    def __init__(self, directory: Path, name: str, endpoint: str, options: dict[str, Any]) -> None:
        self.cluster = f"test-{secrets.token_hex(4)}"
        warm = options.pop("warm", {"policy": "off"})
        more = {name: options.pop(name) for name in ("devices", "Slicing") if name in options}
        if "daemons" in options:  # `environment` is that of the containers
            more["environment"] = options.pop("daemons")
        super().__init__(
            directory, name, endpoint, replica_command=[], runtime="docker", cluster=self.cluster, warm=warm, **more
        )
        config = json.loads(self.config.read_text())
        config["Docker"] = {"image": IMAGE, "volumes": {}, "pull": "never", **options}
        self.config.write_text(json.dumps(config))

    def end(self) -> None:
        super().end()
        deadline = time.monotonic() + 30
        while (left := self.containers()) and time.monotonic() < deadline:
            docker("rm", "--force", *left, check=False)  # some may be about to go by themselves
        for network in docker("network", "ls", "--quiet", f"--filter=label=nbos.cluster={self.cluster}").split():
            docker("network", "rm", network)
        remove_walls(Site(self.cluster, self.name, "").interface)

    def containers(self) -> list[str]:
        return containers(cluster=self.cluster)


def docker_kernel(*hosts: str, **fields: Any) -> KernelSpec:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    spec = kernel_spec("k", *hosts, **fields)
    return msgspec.structs.replace(spec, curve_publickey=public, curve_secretkey=secret)


async def record_of(client: Etcd, index: int = 0) -> ReplicaRecord | None:
    return (await view_of(client, "k")).replicas.get(index)


async def reason_of(client: Etcd, part: str, index: int = 0) -> str:
    """What the replica's record says, once that holds `part`."""

    async def said() -> bool:
        record = await record_of(client, index)
        return record is not None and part in record.reason

    await eventually(said, f"the record of replica {index} says {part!r}", 40)
    record = await record_of(client, index)
    assert record is not None
    return record.reason


async def attach(client: Etcd, tmp_path: Path, index: int = 0) -> Client:
    """A line to a replica, once it is ready."""

    async def ready() -> bool:
        record = await record_of(client, index)
        return record is not None and record.state == "ready"

    await eventually(ready, f"replica {index} is ready", 40)
    view = await view_of(client, "k")
    record, spec = view.replicas[index], view.spec
    assert spec is not None
    assert record.ports is not None
    ports = {f"{name}_port": port for name, port in msgspec.structs.asdict(record.ports).items()}
    info = {"ip": record.ip, "transport": "tcp", "signature_scheme": "hmac-sha256", "key": spec.key, **ports}
    info |= {"curve_publickey": spec.curve_publickey, "curve_secretkey": spec.curve_secretkey}
    file = tmp_path / f"connection-{index}.json"
    file.write_text(json.dumps(info))
    return await asyncio.to_thread(lambda: Client(str(file)).ready())


async def begin(client: Etcd, tmp_path: Path, *hosts: str, **fields: Any) -> Client:
    """A kernel on these hosts; a line to its first replica."""
    await create(client, docker_kernel(*hosts, **fields))
    return await attach(client, tmp_path)
