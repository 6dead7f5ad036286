"""A real daemon above a played driver says in every grant, and of every device, what holds slices and why."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from gpu_daemon.slicing import mps
from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import HostRecord
from tests.fakes.nvml import PlayedNVML, gpu, mig
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import Replica, create, kernel_spec
from tests.system.etcdserver import eventually


@pytest.fixture
def driver(tmp_path: Path) -> PlayedNVML:
    return PlayedNVML(tmp_path, gpu(0, mig=1), mig(0))


async def begin(client: Etcd, host: MakeHost, environment: dict[str, str], mechanism: str, **slicing: Any) -> Replica:
    """A replica of a daemon that has chosen `mechanism`."""
    a = host("a", devices="nvml", environment=environment, Slicing=slicing)
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()

    async def chosen() -> bool:
        found = await client.get(keys.host("a"))
        return found is not None and records.decode(found.value, HostRecord).devices[0].mechanism == mechanism

    await eventually(chosen, f"the device's record says {mechanism}", 10)
    return replica


async def share(replica: Replica, n: int, **resources: Any) -> dict[str, Any]:
    answer = await replica.bid(n, **resources)
    (found,) = answer["grant"]["shares"]
    assert (await replica.append(n, answer["token"]))["ok"]
    return dict(found)


async def test_without_trust_between_users_a_slice_is_cooperative_and_a_whole_instance_held(
    client: Etcd, host: MakeHost, driver: PlayedNVML
) -> None:
    replica = await begin(client, host, driver.environment, "cooperative")
    part = await share(replica, 1, tpcs=4)
    assert (part["mechanism"], part["of"], part["mps"]) == ("cooperative", 8, "")
    assert "Slicing.one_trust_domain" in part["why"]
    assert (await share(replica, 2, tpcs=8))["mechanism"] == "mig"


async def test_with_mps_and_trust_it_is_held_by_a_green_context(
    client: Etcd, host: MakeHost, driver: PlayedNVML, tmp_path: Path
) -> None:
    pipes = tmp_path / "mps"
    pipes.mkdir()
    command = tmp_path / "driver" / mps.COMMAND
    command.write_text('#!/bin/sh\nread asked; [ "$asked" = get_server_list ]\n')
    command.chmod(0o755)
    environment = {**driver.environment, "PATH": f"{command.parent}:{driver.environment['PATH']}"}
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(pipes / "control"))
    replica = await begin(client, host, environment, "green", one_trust_domain=True, mps_pipe=str(pipes))
    part = await share(replica, 1, tpcs=4)
    assert (part["mechanism"], part["why"], part["mps"]) == ("green", "", str(pipes))
