"""The Docker runtime against a real Engine: what starts, what does not and why, what ends, what is found again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import docker as docker_sdk
import pytest

from nbos.strays import Stray, daemon_lives, find_strays, remove_strays
from nbos_cluster import membership
from nbos_cluster.etcd import Etcd
from tests.fakes.nvml import PlayedNVML, gpu, mig
from tests.system.containers.conftest import MakeHost
from tests.system.containers.engine import IMAGE, docker, inspect, variant
from tests.system.containers.host import DockerHost, attach, begin, docker_kernel, reason_of, record_of
from tests.system.containers.registry import Registry
from tests.system.daemon.site import create
from tests.system.etcdserver import eventually
from tests.system.nbosenv import environment

pytestmark = pytest.mark.timeout(300)
run = asyncio.to_thread


async def test_a_container_is_what_the_options_say(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    a = host(cpus=1.5, pids=500, memory="700M", user="1000:1000", environment={"LAB": "yes"})
    kernel = await begin(client, tmp_path, "a", memory_limit=400 << 20, env={"MINE": "1"})
    assert await run(kernel.value, "__import__('os').environ['LAB'] + __import__('os').environ['MINE']", 1) == "'yes1'"
    assert "DAEMON_SECRET" not in await run(kernel.value, "dict(__import__('os').environ)", 2)
    (container,) = a.containers()
    found = inspect(container)
    limits = found["HostConfig"]
    assert (limits["Memory"], limits["MemorySwap"]) == (400 << 20, 400 << 20)
    assert (limits["NanoCpus"], limits["PidsLimit"], found["Config"]["User"]) == (1_500_000_000, 500, "1000:1000")
    assert limits["DeviceRequests"] == []
    record = await record_of(client)
    assert record is not None
    assert (record.container, record.pid) == (container, found["State"]["Pid"])
    kernel.close()


def nothing_left(host: DockerHost) -> bool:
    return not host.containers()


LOOK = """
import os
look = lambda: sorted(line.split()[4] for line in open("/proc/self/mountinfo"))
mounts = [m for m in look() if not m.startswith(("/proc", "/sys", "/dev/pts", "/dev/mqueue", "/dev/null"))]
"""


async def test_in_one_trust_domain_a_container_sees_the_pipes_of_mps_and_nothing_more_of_the_host(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    """The devices are played: what is looked at are the container's mounts."""
    pipes = tmp_path / "mps"
    pipes.mkdir()
    pipes.chmod(0o755)
    (pipes / "control").write_text("")
    driver = PlayedNVML(tmp_path, gpu(0, mig=1), mig(0))
    found = []
    for name, trust in (("a", False), ("b", True)):
        played = {"devices": "nvml", "daemons": driver.environment, "gpus": "none"}
        one = host(name, Slicing={"one_trust_domain": trust, "mps_pipe": str(pipes)}, **played)
        kernel = await begin(client, tmp_path, name)
        await run(kernel.run, LOOK, 1)
        found.append(eval(await run(kernel.value, "mounts", 2)))
        there = f"(os.path.exists({str(pipes / 'control')!r}), os.path.exists({str(tmp_path)!r} + '/a.json'))"
        assert await run(kernel.value, there, 3) == str((trust, False))
        kernel.close()
        assert (await client.commit(membership.delete("k"))).succeeded
        await eventually(partial(nothing_left, one), "its container is gone", 20)
    without, within = found
    assert sorted(set(within) - set(without)) == [str(pipes)], "/dev/shm is there in any case, the host's in one"
    assert set(without) <= set(within)


async def test_every_way_a_replica_ends_is_noticed_and_told(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    a = host()
    kernel = await begin(client, tmp_path, "a", memory_limit=300 << 20)
    ends = {
        "SIGKILL": lambda pid, container: os.kill(pid, signal.SIGKILL),
        "killed by signal 9": lambda pid, container: docker("kill", container),
        "exit status 7": lambda pid, container: kernel.send("import os; os._exit(7)", 1),
        "SIGSEGV": lambda pid, container: kernel.send("import ctypes; ctypes.string_at(0)", 2),
        "it used all of its 0.29 GiB memory": lambda pid, container: kernel.send("x = bytearray(1 << 30)", 3),
    }
    for told, end in ends.items():
        record = await record_of(client)
        assert record is not None
        await run(end, record.pid, record.container)
        assert told in await reason_of(client, told)
        kernel.close()
        kernel = await attach(client, tmp_path)
        assert len(a.containers()) <= 2
    await eventually(lambda: len(a.containers()) == 1, "only the living container is left")
    kernel.close()


async def test_an_end_is_noticed_at_once(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    a = host()
    kernel = await begin(client, tmp_path, "a")
    (container,) = a.containers()
    os.kill(inspect(container)["State"]["Pid"], signal.SIGKILL)
    await eventually(lambda: "killed by signal 9" in a.log.read_text(), "the daemon saw it", 5)
    kernel.close()


async def test_a_killed_daemon_finds_its_replica_with_its_running_cell(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    a = host()
    kernel = await begin(client, tmp_path, "a")
    await run(kernel.run, "a = 1", 1)
    before = a.containers()
    go = "/tmp/go"
    cell = kernel.send(f"import os, time\nwhile not os.path.exists({go!r}): time.sleep(0.05)\na = 2", 2)
    await run(kernel.shell, cell, "nbos_lead")
    a.kill()
    a.start()
    await eventually(lambda: "found again" in a.log.read_text(), "the new daemon found it")
    docker("exec", before[0], "touch", go)
    await run(kernel.shell, cell, "nbos_committed")
    assert await run(kernel.value, "a", 3) == "2"
    assert a.containers() == before
    kernel.close()


async def test_a_replica_that_died_while_its_daemon_was_away_is_started_again(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    a = host()
    kernel = await begin(client, tmp_path, "a")
    await run(kernel.run, "a = 5", 1)
    (before,) = a.containers()
    a.kill()
    docker("kill", before)
    a.start()
    kernel.close()

    async def anew() -> bool:
        record = await record_of(client)
        return record is not None and record.state == "ready" and record.container != before

    await eventually(anew, "a new container is ready", 30)
    kernel = await attach(client, tmp_path)
    assert await run(kernel.value, "a", 2) == "5"
    assert len(a.containers()) == 1
    kernel.close()


async def test_a_new_daemon_removes_containers_of_no_kernel(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    a = host()
    kernel = await begin(client, tmp_path, "a")
    a.kill()
    stray = docker("run", "--detach", f"--label=nbos.cluster={a.cluster}", "--label=nbos.host=a", IMAGE, "sleep", "600")
    a.start()
    await eventually(lambda: stray not in a.containers(), "the stray is removed")
    assert len(a.containers()) == 1
    kernel.close()


async def test_a_kernel_that_is_deleted_while_its_container_is_made_leaves_none(client: Etcd, host: MakeHost) -> None:
    a = host()
    await create(client, docker_kernel("a"))
    await eventually(lambda: len(a.containers()) == 1, "the container is being made")
    assert (await client.commit(membership.delete("k"))).succeeded
    await eventually(lambda: a.containers() == [], "it is gone")


async def test_a_daemon_that_is_told_to_stop_leaves_nothing(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    a = host()
    kernel = await begin(client, tmp_path, "a")
    network = f"nbos-{a.cluster}-a"
    assert network in docker("network", "ls", "--format", "{{.Name}}").split()
    a.kill(signal.SIGTERM)
    assert a.containers() == []
    assert network not in docker("network", "ls", "--format", "{{.Name}}").split()
    kernel.close()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["USER 0", "RUN /opt/nbos/bin/pip uninstall -q -y blake3 cloudpickle"], "lacks blake3, cloudpickle"),
        (["ENV PATH=/nowhere"], "it has no Python on its PATH"),
        (["USER 0", "RUN sed -i s/^Version:.*/Version:\\ 6.29/ /opt/nbos/lib/*/site-packages/ipykernel-*/METADATA"],
         "it has ipykernel 6.29, a kernel needs 7.4"),
    ],
)  # fmt: skip
async def test_an_image_that_cannot_run_a_kernel_is_told_what_it_lacks(
    client: Etcd, host: MakeHost, lines: list[str], told: str
) -> None:
    name = variant("nbos/kernel:unfit", *lines)
    host(image=name)
    await create(client, docker_kernel("a"))
    reason = await reason_of(client, told)
    assert name in reason
    assert "nbos[kernel]" in reason


async def test_a_missing_image_is_named_with_the_way_out(client: Etcd, host: MakeHost) -> None:
    host(pull="missing")
    await create(client, docker_kernel("a", image="localhost:9/lab/none:1"))
    reason = await reason_of(client, "cannot be got")
    assert "localhost:9/lab/none:1" in reason
    assert "docker pull" in reason


async def test_a_pull_is_told_as_it_goes_on(registry: Registry, client: Etcd, host: MakeHost) -> None:
    host(pull="missing")
    await create(client, docker_kernel("a", image=registry.image))
    assert f"getting the image {registry.image}: " in await reason_of(client, "of 40 MB so far")
    registry.go_on.set()
    # It is there, and holds no Python.
    await reason_of(client, f"the image {registry.image} cannot run a kernel: it has no Python")


async def test_a_daemon_that_is_told_to_stop_does_not_wait_for_a_pull(
    registry: Registry, client: Etcd, host: MakeHost
) -> None:
    a = host(pull="missing")
    await create(client, docker_kernel("a", image=registry.image))
    await reason_of(client, "of 40 MB so far")
    assert a.kill(signal.SIGTERM) == 0


async def test_a_home_that_belongs_to_somebody_else_is_told(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    homes = tmp_path / "homes"
    (homes / "ann").mkdir(parents=True)
    host(volumes={str(homes / "{owner}"): "{home}"})
    await create(client, docker_kernel("a"))
    assert "user 1000:1000 may not write in the home folder /home/jovyan" in await reason_of(client, "may not write")
    (homes / "ann").chmod(0o777)

    async def ready() -> bool:
        record = await record_of(client)
        return record is not None and record.state == "ready"

    await eventually(ready, "with the folder opened it starts", 30)


async def test_a_named_volume_keeps_the_home(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    volume = f"nbos-test-{os.getpid()}-{time.monotonic_ns()}"
    a = host(volumes={volume + "-{username}": "{home}"})
    try:
        kernel = await begin(client, tmp_path, "a", owner="ann@Lab")
        await run(kernel.run, "open('kept', 'w').write('x')", 1)
        kernel.send("import os; os._exit(0)", 2)
        kernel.close()
        await reason_of(client, "exit status 0")
        kernel = await attach(client, tmp_path)
        assert await run(kernel.value, "open('kept').read()", 3) == "'x'"
        kernel.close()
    finally:
        a.end()  # before its containers' volume goes: the daemon would make another one
        for name in docker("volume", "ls", "--quiet", f"--filter=name={volume}").split():
            docker("volume", "rm", name)


CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
    print("open")
except OSError as err:
    print(err)
"""


def connect_from(container: str, address: str, port: int) -> str:
    return docker("exec", container, "python3", "-c", CONNECT, address, str(port))


async def test_it_is_the_walls_that_keep_replicas_off_this_host(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    a, b = host("a", walls="off"), host("b")
    one = await begin(client, tmp_path, "a", "b")
    other = await attach(client, tmp_path, 1)
    said = {}
    with socket.create_server(("0.0.0.0", 0)) as service:
        for daemon in (a, b):
            (container,) = daemon.containers()
            (network,) = inspect(container)["NetworkSettings"]["Networks"].values()
            said[daemon.name] = connect_from(container, network["Gateway"], service.getsockname()[1])
    assert said["a"] == "open"
    assert "No route to host" in said["b"]
    (container,) = b.containers()
    assert "No route to host" in connect_from(container, "169.254.169.254", 80)
    for line in (one, other):
        line.close()


async def test_the_doctor_finds_what_a_dead_daemon_left_and_removes_only_that(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    a, b = host("a"), host("b")
    kernel = await begin(client, tmp_path, "a", "b")
    other = await attach(client, tmp_path, 1)
    a.kill()
    api = docker_sdk.from_env().api

    def strays() -> list[Stray]:
        """Only ours: this Engine may have others'."""
        found = find_strays(api, daemon_lives)
        return [stray for stray in found if a.cluster in stray.name or b.cluster in stray.name]

    network = f"nbos-{a.cluster}-a"
    assert {s.id if s.kind == "container" else s.name for s in strays()} == {*a.containers(), network}
    done = await run(subprocess.run, [sys.executable, "-m", "nbos.cli", "doctor"], **nbos_command())
    assert network in done.stdout
    assert "nbos doctor --clean" in done.stdout
    await run(remove_strays, api, strays())
    assert a.containers() == []
    assert len(b.containers()) == 1
    assert strays() == []
    for one in (kernel, other):
        one.close()


def nbos_command() -> dict[str, Any]:
    return {"capture_output": True, "text": True, "env": environment(), "timeout": 60}
