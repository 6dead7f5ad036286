"""Containers that wait for a kernel: given to one, as good as fresh ones, found again, never given twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import docker as docker_sdk
import pytest

from nbos.strays import daemon_lives, find_strays
from nbos_cluster import keys, membership, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import ExpectedRecord, HostRecord, WarmRecord
from tests.fakes.nvml import PlayedNVML, gpu, mig
from tests.system.containers.conftest import MakeHost
from tests.system.containers.engine import IMAGE, docker, inspect, variant
from tests.system.containers.host import DockerHost, attach, begin, docker_kernel, record_of
from tests.system.daemon.site import create, view_of
from tests.system.etcdserver import eventually

pytestmark = pytest.mark.timeout(300)
run = asyncio.to_thread
ONE = {"policy": "fixed", "keep": 1, "reserve": "1M"}
LOOK = "(__import__('os').getcwd(), __import__('sys').path[0], sorted(__import__('os').listdir('/run/nbos')))"


async def warm(client: Etcd, host: str = "a") -> WarmRecord:
    kv = await client.get(keys.host(host))
    record = records.decode(kv.value, HostRecord) if kv is not None else None
    return record.warm[0] if record is not None and record.warm else WarmRecord()


async def waits(client: Etcd, a: DockerHost, count: int = 1) -> list[str]:
    """The containers that wait, once there are so many."""

    async def there() -> bool:
        return (await warm(client)).ready == count and len(waiting(a)) == count

    await eventually(there, f"{count} containers wait", 60)
    return waiting(a)


def waiting(a: DockerHost) -> list[str]:
    """Those whose names are still those of their slots, not of replicas."""
    filters = ["--filter=label=nbos.warm", f"--filter=label=nbos.cluster={a.cluster}"]
    shown = '{{.ID}} {{.Names}} {{.Label "nbos.folder"}}'
    lines = docker("ps", "--all", "--no-trunc", *filters, "--format", shown).splitlines()
    return [container for container, name, slot in map(str.split, lines) if name.endswith(f"-{slot}")]


async def container_of(client: Etcd) -> str:
    record = await record_of(client)
    assert record is not None
    return record.container


async def test_a_kernel_becomes_the_container_that_waited(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    a = host(warm=ONE, pids=500, environment={"LAB": "yes"})
    (before,) = await waits(client, a)
    kernel = await begin(client, tmp_path, "a", memory_limit=400 << 20, env={"MINE": "1"}, cwd="/home")
    assert await container_of(client) == before
    assert await run(kernel.value, "__import__('os').environ['LAB'] + __import__('os').environ['MINE']", 1) == "'yes1'"
    assert await run(kernel.value, LOOK, 2) == "('/home', '/home', ['s', 'start.py', 'taken'])"
    found = inspect(before)
    limits = found["HostConfig"]
    assert (limits["Memory"], limits["MemorySwap"], limits["PidsLimit"]) == (400 << 20, 400 << 20, 500)
    assert found["Name"] == f"/nbos-{a.cluster}-a-{a.folder('k', 0).name}"
    assert (await waits(client, a)) != [before]
    await run(kernel.send, "x = bytearray(1 << 30)", 3)

    async def abandoned() -> bool:
        """The replica's record says so for a moment only: another container waits to be it."""
        entry = (await view_of(client, "k")).log.get(3)
        return entry is not None and "it used all of its 0.39 GiB memory" in entry.reason

    await eventually(abandoned, "its entry says that it used all of its memory", 40)
    kernel.close()


async def test_a_replica_that_ran_before_starts_afresh(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    """Its router knows its ports; a container that waits has others."""
    a = host(warm=ONE)
    (first,) = await waits(client, a)
    kernel = await begin(client, tmp_path, "a")
    await run(kernel.run, "a = 5", 1)
    (second,) = await waits(client, a)
    docker("kill", first)
    kernel.close()

    async def anew() -> bool:
        record = await record_of(client)
        return record is not None and record.state == "ready" and record.container not in ("", first)

    await eventually(anew, "a new container is ready", 30)
    assert waiting(a) == [second]
    kernel = await attach(client, tmp_path)
    assert await run(kernel.value, "a", 2) == "5"
    kernel.close()


async def test_a_restarted_daemon_finds_what_waits_and_what_runs(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    a = host(warm=ONE)
    await waits(client, a)
    kernel = await begin(client, tmp_path, "a")
    await run(kernel.run, "a = 1", 1)
    (other,) = await waits(client, a)
    runs = await container_of(client)
    a.kill()
    a.start()
    await eventually(lambda: "found again" in a.log.read_text(), "the new daemon found the replica")

    async def goes_on() -> bool:
        with contextlib.suppress(AssertionError):  # it has not seen the new daemon yet
            return await run(kernel.value, "a", 2) == "1"
        return False

    await eventually(goes_on, "the replica goes on")
    assert await waits(client, a) == [other]
    assert (await client.commit(membership.delete("k"))).succeeded
    kernel.close()
    await eventually(lambda: runs not in a.containers(), "the kernel is gone")
    kernel = await begin(client, tmp_path, "a", incarnation=1)
    assert await container_of(client) == other
    kernel.close()


async def test_what_waited_before_its_host_had_mps_is_given_to_nobody(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    """It does not see the pipes. The devices are played."""
    pipes, played = tmp_path / "mps", PlayedNVML(tmp_path, gpu(0, mig=1), mig(0)).environment
    trust = {"one_trust_domain": True, "mps_pipe": str(pipes)}
    a = host(warm=ONE, Slicing=trust, devices="nvml", daemons=played, gpus="none")
    (before,) = await waits(client, a)
    pipes.mkdir()
    kernel = await begin(client, tmp_path, "a")
    assert await container_of(client) != before
    assert await run(kernel.value, f"__import__('os').path.isdir({str(pipes)!r})", 1) == "True"

    async def sees_it() -> bool:
        return [str(pipes) in str(inspect(one)["HostConfig"]["Mounts"]) for one in waiting(a)] == [True]

    await eventually(sees_it, "the next one that waits sees the pipes", 60)
    kernel.close()


async def test_options_that_changed_leave_nothing_of_before_waiting(client: Etcd, host: MakeHost) -> None:
    a = host(warm=ONE)
    (before,) = await waits(client, a)
    a.kill()
    config = json.loads(a.config.read_text())
    config["Docker"]["pids"] = 300
    a.config.write_text(json.dumps(config))
    a.start()
    await eventually(lambda: before not in a.containers(), "the old one is removed")
    (now,) = await waits(client, a)
    assert inspect(now)["HostConfig"]["PidsLimit"] == 300


async def test_one_that_was_about_to_be_given_away_when_its_daemon_died_ends(client: Etcd, host: MakeHost) -> None:
    a = host(warm=ONE)
    (before,) = await waits(client, a)
    slot = inspect(before)["Config"]["Labels"]["nbos.folder"]
    (a.run_dir / "w" / slot / "d" / "taken").touch()
    docker("rename", before, f"nbos-{a.cluster}-a-0123456789ab-0")
    a.kill()
    await eventually(lambda: not inspect(before)["State"]["Running"], "it ended")
    a.start()
    await eventually(lambda: before not in a.containers(), "it is removed", 30)
    assert await waits(client, a) != [before]


async def test_an_image_that_was_got_anew_is_used_at_once(client: Etcd, host: MakeHost, tmp_path: Path) -> None:
    name = variant("nbos/kernel:pool-changes", "LABEL edition=1")
    a = host(image=name, warm=ONE)
    (before,) = await waits(client, a)
    variant("nbos/kernel:pool-changes", f"LABEL edition={time.monotonic_ns()}")
    kernel = await begin(client, tmp_path, "a")
    new = json.loads(docker("image", "inspect", name))[0]["Id"]
    assert inspect(await container_of(client))["Image"] == new
    assert before not in a.containers()
    assert inspect((await waits(client, a))[0])["Image"] == new
    kernel.close()


async def test_the_reason_why_none_waits_is_told(client: Etcd, host: MakeHost) -> None:
    lacking = "RUN /opt/nbos/bin/pip uninstall -q -y blake3"
    host(image=variant("nbos/kernel:pool-unfit", "USER 0", lacking), warm=ONE)

    async def told() -> bool:
        return "cannot run a kernel: its Python" in (note := (await warm(client)).note) and "lacks blake3" in note

    await eventually(told, "what the image lacks is told", 60)


async def expect(client: Etcd, owner: str) -> int:
    lease = await client.lease_grant(240)
    await client.put(keys.expected(owner), records.encode(ExpectedRecord(owner=owner)), lease)
    return lease


async def test_where_homes_are_owners_only_the_one_who_is_expected_gets_it(
    client: Etcd, host: MakeHost, tmp_path: Path
) -> None:
    homes = tmp_path / "homes"
    for owner in ("ann", "bob"):
        (homes / owner).mkdir(parents=True)
        (homes / owner).chmod(0o777)
    a = host(volumes={str(homes / "{owner}"): "{home}"}, warm={**ONE, "calm": 0.0})
    lease = await expect(client, "ann")
    (anns,) = await waits(client, a)
    assert inspect(anns)["Config"]["Labels"]["nbos.owner"] == "ann"
    await create(client, docker_kernel("a", owner="bob"))
    kernel = await attach(client, tmp_path)
    assert await container_of(client) != anns
    kernel.close()
    assert (await client.commit(membership.delete("k"))).succeeded
    await eventually(lambda: len(a.containers()) - len(waiting(a)) == 0, "bob's kernel is gone")
    assert anns in waiting(a)
    kernel = await begin(client, tmp_path, "a", owner="ann")
    assert await container_of(client) == anns
    await run(kernel.run, "open('mine', 'w').close()", 1)
    assert (homes / "ann" / "mine").exists()
    kernel.close()
    await client.lease_revoke(lease)


async def test_who_is_expected_no_more_has_no_container(client: Etcd, host: MakeHost) -> None:
    a = host(volumes={"nbos-test-{username}": "/home/jovyan/kept"}, warm={**ONE, "calm": 0.0})
    lease = await expect(client, "ann")
    await waits(client, a)
    await client.lease_revoke(lease)
    await eventually(lambda: a.containers() == [], "it ended", 30)


async def test_what_waits_for_a_dead_daemon_is_the_doctors(client: Etcd, host: MakeHost) -> None:
    a = host(warm=ONE)
    (one,) = await waits(client, a)
    api: Any = docker_sdk.from_env().api
    assert one not in {stray.id for stray in find_strays(api, daemon_lives)}
    a.kill()
    (stray,) = [s for s in find_strays(api, daemon_lives) if s.id == one]
    assert "waits for a kernel" in stray.about
    assert IMAGE in stray.about
