"""What docs/cluster.md has an administrator do while the cluster is used: upgrade a host, back up, restore."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cluster.history import History
from tests.cluster.machines import HOSTS, MEMBERS, Machines
from tests.cluster.test_faults import lead, some_cells
from tests.system.cluster import Notebook
from tests.system.containers.engine import docker
from tests.system.hubclient import eventually

pytestmark = pytest.mark.timeout(300)


async def test_a_host_is_upgraded_while_cells_run(machines: Machines, history: History) -> None:
    """Drained, its machine replaced by one made from the image, and back in use: no cell fails, none is run twice."""
    host, over = await lead(history), asyncio.Event()

    async def cells() -> None:
        while not over.is_set():
            result = await history.run("time.sleep(0.2)", timeout=60)
            assert (result.status, result.stderr) == ("ok", "")

    load = asyncio.create_task(cells())
    assert "no replica is left there" in await asyncio.to_thread(machines.nbos, "drain", host, "--wait", "60")
    before = docker("inspect", "--format", "{{.Id}}", machines.container(host))
    await asyncio.to_thread(machines.command, "compose", "up", "--detach", "--no-deps", "--force-recreate", host)
    assert docker("inspect", "--format", "{{.Id}}", machines.container(host)) != before
    await machines.whole()
    over.set()
    await load
    # A daemon that starts takes replicas again: another one can be emptied onto it.
    other = next(name for name in HOSTS if name != host)
    assert "no replica is left there" in await asyncio.to_thread(machines.nbos, "drain", other, "--wait", "60")
    await asyncio.to_thread(machines.nbos, "drain", other, "--undo")
    await some_cells(history)


def save(machines: Machines, folder: Path) -> None:
    """etcd first, then the blobs."""
    say = f"etcdctl --endpoints https://{machines.etcd[0]} --cacert /certs/admin/ca.pem --cert /certs/admin/cert.pem"
    machines.with_etcd(folder, f"{say} --key /certs/admin/key.pem snapshot save /backup/nbos.db")
    machines.inside("disks", "tar", "-C", "/disks/blobs", "-cf", "/tmp/blobs.tar", ".")
    docker("cp", f"{machines.container('disks')}:/tmp/blobs.tar", str(folder))


def restore(machines: Machines, folder: Path) -> None:
    """Everything but the proxy is stopped; hosts end their replicas as they go down."""
    services = ["hub", *HOSTS, *MEMBERS]
    machines.command("compose", "stop", "--timeout", "30", *services)
    members = ",".join(f"{name}=https://{machines.network}.2{n + 1}:2380" for n, name in enumerate(MEMBERS))
    for n, name in enumerate(MEMBERS):
        own = f"--name {name} --initial-advertise-peer-urls https://{machines.network}.2{n + 1}:2380"
        data = f"/members/{name}/data"
        command = f"etcdctl snapshot restore /backup/nbos.db {own} --initial-cluster {members} --data-dir {data}"
        machines.with_etcd(folder, f"rm -rf {data} && {command} && chown -R 1000:1000 {data}")
    machines.inside("disks", "sh", "-c", "rm -rf /disks/blobs/*")
    docker("cp", str(folder / "blobs.tar"), f"{machines.container('disks')}:/tmp")
    machines.inside("disks", "tar", "-C", "/disks/blobs", "-xf", "/tmp/blobs.tar")
    machines.command("compose", "start", *MEMBERS)
    machines.command("compose", "start", *HOSTS)
    machines.command("compose", "start", "hub")


async def test_a_cluster_is_restored_from_its_backup(machines: Machines, tmp_path: Path) -> None:
    """With variables as they were, the large ones, too; what came after the backup is gone."""
    notebook = await Notebook.open(machines, "ada")
    await notebook.run("import hashlib, os; small = [1, 2]; big = os.urandom(1 << 20)\ndef double(x): return 2 * x")
    digest = await notebook.run("hashlib.sha256(big).hexdigest()")
    await notebook.settled(60)
    await asyncio.to_thread(save, machines, tmp_path)
    await notebook.run("small.append(3); big = b''; later = 1")
    await notebook.channels.close()
    await asyncio.to_thread(restore, machines, tmp_path)
    await machines.whole(120)
    server = await machines.hub.start_server("ada")

    async def found() -> bool:
        return notebook.kernel in {kernel["id"] for kernel in await server.kernels()}

    await eventually(found, "the new server knows the kernel", 30)
    notebook.channels = await server.open(notebook.kernel)
    assert await notebook.run("double(small[1]), small, 'later' in dir()", 90) == "(4, [1, 2], False)"
    assert await notebook.run("hashlib.sha256(big).hexdigest()") == digest
    assert await notebook.run("small.append(4); small") == "[1, 2, 4]"
    assert len(await notebook.settled(90)) == 3
    await notebook.close()
