"""A whole NBOS whose replicas run in Docker, driven as a browser drives it: it does what it does with processes, and
user code in a replica reaches nothing but its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from nbos.state import StateDir
from tests.system.cluster import KERNEL, Cluster, Notebook
from tests.system.containers.engine import IMAGE, containers, docker, inspect
from tests.system.etcdserver import eventually
from tests.system.nbosenv import nbos_status, replicas

pytestmark = pytest.mark.timeout(300)
NOT_THERE = "localhost:9/lab/none:1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, image: None) -> Iterator[Cluster]:
    state = tmp_path_factory.mktemp("containers") / "state"
    limits = state.parent / "limits.json"
    limits.write_text(json.dumps({"default": {"replica_memory": "400M", "images": [NOT_THERE]}}))
    cluster = Cluster(state, "--runtime", "docker", "--image", IMAGE, "--limits", str(limits))
    cluster.start()
    yield cluster
    assert cluster.stop() == []
    assert [
        c for c in containers() if inspect(c)["Config"]["Labels"].get("nbos.run-dir", "").startswith(str(state))
    ] == []


@pytest.fixture
async def notebook(cluster: Cluster) -> AsyncIterator[Notebook]:
    notebook = await Notebook.open(cluster, "ada")
    await notebook.run("import os, socket, subprocess, time; x = 40")
    await notebook.settled()
    yield notebook
    await notebook.close()


@pytest.fixture
async def inside(cluster: Cluster) -> AsyncIterator[Notebook]:
    """A kernel of one replica, whose cells try what they must not."""
    notebook = await Notebook.open(cluster, "eve", {"replicas": 1})
    await notebook.run("import os, socket, subprocess, time")
    yield notebook
    await notebook.close()


async def containers_of(notebook: Notebook) -> dict[int, str]:
    """By replica. Labels do not tell of one that was started ahead, its process does."""
    of_cluster = containers(cluster=f"up-{StateDir(notebook.cluster.state_dir).mark}")
    # Of those that end meanwhile nothing is known.
    known = json.loads(docker("inspect", *of_cluster, check=False) or "[]")
    pids = {one["State"]["Pid"]: one["Id"] for one in known}
    return {r.index: pids[r.pid] for r in await replicas(notebook.cluster.hub, notebook.kernel) if r.pid in pids}


async def test_three_containers_are_one_kernel(notebook: Notebook) -> None:
    assert {r.host for r in await notebook.settled()} == {"host-1", "host-2", "host-3"}
    assert len(await containers_of(notebook)) == 3
    before = await notebook.executor()
    docker("kill", (await containers_of(notebook))[before.index])
    assert await notebook.run("x + 2") == "42"
    assert (await notebook.executor()).index != before.index
    await notebook.settled()


async def test_an_owners_very_first_kernel_was_started_ahead(cluster: Cluster) -> None:
    server = await cluster.hub.start_server("first", {"replicas": 2})
    name = f"up-{StateDir(cluster.state_dir).mark}"
    await eventually(lambda: len(containers(cluster=name, owner="first")) == 3, "each host has one for its owner", 60)
    before = set(containers(cluster=name, owner="first"))
    await eventually(lambda: not coming_up(before), "all of them wait", 60)
    kernel = await server.start_kernel(KERNEL)
    notebook = Notebook(cluster, server, kernel, await server.open(kernel))
    assert await notebook.run("6 * 7") == "42"
    await notebook.settled()
    assert set((await containers_of(notebook)).values()) < before
    await notebook.close()


def coming_up(waiting: set[str]) -> list[str]:
    """Those whose socket is still there: its daemon takes it away when they report."""
    folders = [m["Source"] for c in waiting for m in inspect(c)["Mounts"] if m["Destination"] == "/run/nbos"]
    return [folder for folder in folders if os.path.exists(f"{folder}/w")]


async def test_out_of_memory_in_a_cell_is_told_as_that(notebook: Notebook) -> None:
    result = await notebook.channels.execute("x = bytearray(1 << 30)")
    assert result.error.startswith("NBOSReplicaDied")
    assert "it used all of its 0.39 GiB memory; use less, or ask for a larger limit" in result.error
    assert await notebook.run("x") == "40"
    await notebook.settled()


async def test_a_running_cell_outlives_its_daemon(cluster: Cluster, notebook: Notebook) -> None:
    cell = await notebook.channels.submit(
        "print('begun', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.05)\nx = 41"
    )
    await cell.text("begun")
    before = await notebook.executor()
    os.kill(cluster.daemon_pid(before.host), signal.SIGKILL)
    (cluster.state_dir / "homes" / "ada" / "go").touch()
    assert (await cell.result(30)).status == "ok"
    assert await notebook.run("x") == "41"
    after = {r.index: r for r in await notebook.settled()}
    assert after[before.index].pid == before.pid
    (cluster.state_dir / "homes" / "ada" / "go").unlink()


# -- from inside ------------------------------------------------------------------------------------------------------

NOTHING = "refused, or nowhere"


async def reach(inside: Notebook, address: str, port: int) -> str:
    """What a connection from the replica to there ends with."""
    code = f"""
s = socket.socket(); s.settimeout(1.5)
try:
    s.connect(({address!r}, {port})); print("open")
except OSError as err:
    print({NOTHING!r}, err)
finally:
    s.close()
"""
    return await inside.run(code)


async def own_addresses(inside: Notebook) -> list[str]:
    """This host's addresses: all of its own, and the one that the replica has for its gateway."""
    index = (await inside.executor()).index
    networks = inspect((await containers_of(inside))[index])["NetworkSettings"]["Networks"]
    gateways = [network["Gateway"] for network in networks.values()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; says which address would
        return [*gateways, probe.getsockname()[0]]


async def test_no_capability_and_no_way_to_more(inside: Notebook) -> None:
    status = await inside.run("print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    unshare = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); (libc.unshare(0x10000000), ctypes.get_errno())"
    assert await inside.run(unshare) == "(-1, 1)"
    mount = "(libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''), ctypes.get_errno())"
    assert await inside.run(mount) == "(-1, 1)"


async def test_the_images_files_cannot_be_changed(inside: Notebook) -> None:
    for path in ("/etc/x", "/opt/nbos/x", "/usr/bin/x", "/run/nbos/x", "/x"):
        result = await inside.channels.execute(f"open({path!r}, 'w')")
        assert "Read-only file system" in result.error, path
    assert await inside.run("open('/tmp/x', 'w').write('x'); open('x', 'w').write('x')") == "1"


async def test_no_file_of_the_host_is_there(cluster: Cluster, inside: Notebook) -> None:
    tls = cluster.state_dir / "tls"
    (cluster.state_dir / "homes" / "bob").mkdir(exist_ok=True)
    assert (tls / "up.key").exists()
    for path in (tls, cluster.state_dir / "secrets.json", cluster.state_dir / "blobs", cluster.state_dir / "hosts"):
        assert await inside.run(f"os.path.exists({str(path)!r})") == "False", path
    assert await inside.run(f"os.listdir({str(cluster.state_dir)!r})") == "['homes']"
    assert await inside.run(f"os.listdir({str(cluster.state_dir / 'homes')!r})") == "['eve']"
    found = await inside.run("print(*(p for p in ('/var/run/docker.sock', '/run/docker.sock') if os.path.exists(p)))")
    assert found == "\n"
    assert await inside.run("sorted(os.listdir('/run/nbos'))") in (
        "['connection.json', 's', 'start.py']",
        "['s', 'start.py', 'taken']",
    )


async def test_no_process_of_anybody_else_is_there(inside: Notebook) -> None:
    names = await inside.run(
        "for p in filter(str.isdigit, os.listdir('/proc')):\n"
        "    print(open(f'/proc/{p}/cmdline').read().replace(chr(0), ' ').split()[0])"
    )
    assert {os.path.basename(name) for name in names.split()} <= {"docker-init", "python3"}


async def test_a_service_of_the_host_is_out_of_reach(inside: Notebook) -> None:
    """On all addresses, as an etcd or a daemon of a cluster listens."""
    with socket.create_server(("0.0.0.0", 0)) as service:
        port = service.getsockname()[1]
        for address in await own_addresses(inside):
            socket.create_connection((address, port), 5).close()
            assert NOTHING in await reach(inside, address, port), address


async def test_etcd_is_out_of_reach(cluster: Cluster, inside: Notebook) -> None:
    (endpoint,) = nbos_status(cluster.state_dir)["etcd"]["endpoints"]
    port = int(endpoint.rpartition(":")[2])
    for address in ("127.0.0.1", *await own_addresses(inside)):
        assert NOTHING in await reach(inside, address, port), address


async def test_other_replicas_are_out_of_reach(cluster: Cluster, inside: Notebook) -> None:
    other = await Notebook.open(cluster, "bob", {"replicas": 2})
    await other.settled()
    for container in (await containers_of(other)).values():
        settings = inspect(container)["NetworkSettings"]
        published = [int(p[0]["HostPort"]) for p in settings["Ports"].values()]
        (network,) = settings["Networks"].values()
        assert NOTHING in await reach(inside, network["IPAddress"], published[0])
        for address in await own_addresses(inside):
            assert NOTHING in await reach(inside, address, published[0])
    await other.close()


async def test_the_replica_has_no_secret_in_its_environment(inside: Notebook) -> None:
    environment = json.loads(await inside.run("import json; print(json.dumps(dict(os.environ)))"))
    assert not [name for name in environment if "TOKEN" in name or "ETCD" in name or name.startswith("JUPYTERHUB")]


async def test_its_processes_are_counted(inside: Notebook) -> None:
    places = "('/sys/fs/cgroup/pids.max', '/sys/fs/cgroup/pids/pids.max')"
    assert await inside.run(f"print(*(open(p).read() for p in {places} if os.path.exists(p)))") == "4096\n\n"


async def test_a_waiting_cell_says_which_image_is_missing(cluster: Cluster) -> None:
    notebook = await Notebook.open(cluster, "carl", {"image": NOT_THERE, "replicas": 1})
    cell = await notebook.channels.submit("1")
    await cell.text(f"the image {NOT_THERE} is not on this host and cannot be got")
    assert "docker pull" in cell.written()
    await notebook.close()
