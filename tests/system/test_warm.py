"""Replicas forked from a warm parent: as good as fresh ones, and alive whatever dies beside them. Real daemons, a real
etcd, real kills."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from nbos_cluster import keys, records
from nbos_cluster.etcd import Etcd
from nbos_cluster.records import HostRecord, WarmRecord
from tests.system.daemon.site import Host, create, kernel_spec, view_of
from tests.system.etcdserver import EtcdServer, eventually
from tests.system.fake_daemon import Client

MakeHost = Callable[..., Host]
run = asyncio.to_thread


@pytest.fixture
def host(tmp_path: Path, etcd: EtcdServer) -> Iterator[MakeHost]:
    hosts: list[Host] = []

    def make(**warm: Any) -> Host:
        options = {"policy": "fixed", "keep": 1, "reserve": "1M", "learn": False, **warm}
        hosts.append(Host(tmp_path, "a", etcd.endpoint, replica_command=[], warm=options))
        return hosts[-1].start()

    yield make
    for one in hosts:
        one.end()
        assert "Traceback" not in one.log.read_text()


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Etcd]:
    async with Etcd([etcd.endpoint]) as opened:
        yield opened


async def warm(client: Etcd) -> WarmRecord:
    kv = await client.get(keys.host("a"))
    record = records.decode(kv.value, HostRecord) if kv is not None else None
    return record.warm[0] if record is not None and record.warm else WarmRecord()


async def waits(client: Etcd, count: int = 1, seconds: float = 20.0) -> None:
    async def there() -> bool:
        return (await warm(client)).ready == count

    await eventually(there, f"{count} replicas wait", seconds)


async def start(client: Etcd, host: Host, kernel: str = "k", **fields: Any) -> Client:
    public, secret = (key.decode() for key in zmq.curve_keypair())
    spec = kernel_spec(kernel, "a", **fields)
    await create(client, msgspec.structs.replace(spec, curve_publickey=public, curve_secretkey=secret))
    return await attach(client, host, kernel)


async def attach(client: Etcd, host: Host, kernel: str = "k") -> Client:
    """Once its record says that it is ready, and where the log stands."""

    async def ready() -> bool:
        record = (await view_of(client, kernel)).replicas.get(0)
        return record is not None and record.state == "ready" and record.applied >= 0

    await eventually(ready, f"kernel {kernel} is ready")
    return await run(lambda: Client(str(host.folder(kernel, 0) / "connection.json")).ready())


def pid(host: Host, kernel: str = "k") -> int:
    return int(json.loads((host.folder(kernel, 0) / "process.json").read_text())["pid"])


def parents(host: Host) -> list[psutil.Process]:
    """The daemon's warm parents."""
    assert host.process is not None
    children = psutil.Process(host.process.pid).children()
    return [p for p in children if p.status() != psutil.STATUS_ZOMBIE and "nbos_kernel.warm" in p.cmdline()]


async def test_a_new_kernel_is_the_spare_that_waited(client: Etcd, host: MakeHost) -> None:
    one = host(modules=["numpy"])
    await waits(client)
    (parent,) = parents(one)
    (spare,) = parent.children()
    kernel = await start(client, one, cwd="/tmp", env={"JPY_SESSION_NAME": "here.ipynb"})
    assert pid(one) == spare.pid
    told = "import os, sys\n(os.getpid() == os.getsid(0), os.getcwd(), sys.path[0], os.environ['JPY_SESSION_NAME'], "
    told += "'DAEMON_SECRET' in os.environ, 'numpy' in sys.modules)"
    assert await run(kernel.run, told, 1)
    facts = "(os.getsid(0) == os.getpid(), os.getcwd(), '/tmp' in sys.path[:2], 'numpy' in sys.modules)"
    assert await run(kernel.value, facts, 2) == "(True, '/tmp', True, False)"
    seen = "(os.environ['JPY_SESSION_NAME'], 'DAEMON_SECRET' in os.environ, os.environ.get('HOME') != '')"
    assert await run(kernel.value, seen, 3) == "('here.ipynb', False, True)"
    assert psutil.Process(spare.pid).cmdline()[1:4] == ["-m", "nbos_kernel", "--nbos-socket"]
    await waits(client)
    kernel.close()


async def test_a_spare_has_the_descriptors_of_a_fresh_replica_and_no_more(client: Etcd, host: MakeHost) -> None:
    one = host()
    await waits(client)
    code = "import os, collections\nfds = collections.Counter()\nfor n in os.listdir('/proc/self/fd'):\n"
    code += "    try: fds[os.readlink(f'/proc/self/fd/{n}').split(':')[0].rsplit('/')[-1]] += 1\n"
    # Not counted: loops, journals and packages' files, which are opened and closed all the time.
    code += "    except OSError: pass\nkinds = {kind: fds[kind] for kind in ('log', 'memfd', 'null', 'pipe', 'socket')}"
    kinds = []
    for kernel, env in (("warm", {}), ("fresh", {"PYTHON_IS_READ_EARLY": "1"})):
        opened = await start(client, one, kernel, env=env)
        await run(opened.run, code, 1)
        kinds.append(await run(opened.value, "kinds", 2))
        opened.close()
    assert kinds[0] == kinds[1]
    assert "PYTHON_IS_READ_EARLY start afresh" in one.log.read_text()


async def test_forks_share_no_random_numbers_and_no_keys(client: Etcd, host: MakeHost) -> None:
    one = host(modules=["numpy.random", "multiprocessing"])
    await waits(client)
    code = "import random, numpy, multiprocessing, uuid\ndrawn = (random.random(), numpy.random.random(), "
    code += "multiprocessing.current_process().authkey.hex(), uuid.uuid4().hex)"
    drawn = []
    for name in ("k1", "k2"):
        kernel = await start(client, one, name)
        await run(kernel.run, code, 1)
        drawn.append(await run(kernel.value, "' '.join(map(str, drawn))", 2))
        kernel.close()
    first, second = (text.strip("'").split() for text in drawn)
    assert len(first) == 4
    assert not set(first) & set(second)


async def test_arrays_multiply_on_several_threads_in_a_fork(client: Etcd, host: MakeHost) -> None:
    """OpenBLAS and torch had their pools when the parent forked, or make them now."""
    one = host(modules=["numpy", "torch"])
    await waits(client, seconds=60.0)
    kernel = await start(client, one)
    code = "import numpy, torch, threading\na = numpy.ones((600, 600)); b = torch.ones(600, 600, requires_grad=True)\n"
    code += "total = float((a @ a).sum()), float((b @ b).sum()); (b @ b).sum().backward()\n"
    code += "t = threading.Thread(target=lambda: total); t.start(); t.join()"
    assert (await run(kernel.run, code, 1))["content"]["status"] == "ok"
    assert await run(kernel.value, "total == (600.0**3, 600.0**3), torch.cuda._is_in_bad_fork()", 2) == "(True, False)"
    assert not (await warm(client)).note
    kernel.close()
    # What was imported ahead is no kernel's own: with it, this one would be above its limit from the start.
    small = await start(client, one, "k2", memory_limit=150 << 20)
    before = pid(one, "k2")
    # It is looked at twice a second.
    rest = "import time, psutil; time.sleep(1.5); rss = psutil.Process().memory_info().rss"
    await run(small.run, rest, 1)
    assert await run(small.value, f"rss > {150 << 20}", 2) == "True"
    assert pid(one, "k2") == before
    await run(small.send, "large = bytearray(300_000_000); time.sleep(60)", 3)
    await eventually(lambda: "of 0.15 GiB memory" in one.log.read_text(), "the limit holds")
    small.close()


async def test_modules_that_start_threads_are_not_forked_but_warm(
    client: Etcd, host: MakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module's thread must live in the replica, and keep no spare alive."""
    source = "import threading, time\ndef beat():\n    global beats\n    while True: beats += 1; time.sleep(0.01)\n"
    path = tmp_path / "lib" / "threaded_module_of_a_test.py"
    path.parent.mkdir()
    path.write_text(source + "beats = 0\nthreading.Thread(target=beat).start()\n")
    monkeypatch.setenv("PYTHONPATH", str(path.parent))
    one = host(modules=["threaded_module_of_a_test"])
    await waits(client)
    assert "importing threaded_module_of_a_test starts 1 thread(s)" in (await warm(client)).note
    (spare,) = parents(one)
    kernel = await start(client, one)
    assert pid(one) == spare.pid
    await run(kernel.run, "import threaded_module_of_a_test as m, time\nb = m.beats; time.sleep(0.2)", 1)
    assert await run(kernel.value, "m.beats > b", 2) == "True"
    os.kill(pid(one), signal.SIGKILL)
    await eventually(lambda: "SIGKILL" in one.log.read_text(), "its end is told")
    kernel.close()
    await waits(client)
    (waiting,) = [p for p in parents(one) if p.pid != pid(one)]
    one.kill()
    await eventually(lambda: not waiting.is_running(), "the spare ended with its daemon")
    one.start()


async def test_how_a_forked_replica_ended_is_told(client: Etcd, host: MakeHost) -> None:
    one = host()
    await waits(client)
    kernel = await start(client, one)
    await run(kernel.run, "import os, signal, subprocess; child = subprocess.Popen(['sleep', '600'])", 1)
    child = int(await run(kernel.value, "child.pid", 2))
    await run(kernel.send, "os.kill(os.getpid(), signal.SIGSEGV)", 3)
    await eventually(lambda: "SIGSEGV" in one.log.read_text(), "the segmentation fault is told")
    await eventually(lambda: not psutil.pid_exists(child), "what it started is gone")
    again = await attach(client, one)
    assert await run(again.value, "child", 4)
    kernel.close()
    again.close()


async def test_replicas_outlive_their_warm_parent(client: Etcd, host: MakeHost) -> None:
    one = host()
    await waits(client)
    kernel = await start(client, one)
    await run(kernel.run, "a = 41", 1)
    (parent,) = parents(one)
    parent.kill()

    def another() -> bool:
        return [p.pid for p in parents(one)] not in ([], [parent.pid])

    # The spare that waits is the dead parent's, and as good; taking it makes the next one necessary.
    second = await start(client, one, "k2")
    await eventually(another, "another warm parent is there")
    assert await run(kernel.value, "a + 1", 2) == "42"
    assert await run(second.value, "1", 1) == "1"
    os.kill(pid(one), signal.SIGKILL)
    await eventually(lambda: "how is not known: the warm parent" in one.log.read_text(), "its end is told")
    again = await attach(client, one)
    assert await run(again.value, "a", 3) == "41"
    for opened in (kernel, second, again):
        opened.close()


async def test_a_parent_that_hangs_costs_a_start_nothing_but_time(client: Etcd, host: MakeHost) -> None:
    one = host()
    await waits(client)
    (parent,) = parents(one)
    (spare,) = parent.children()
    parent.suspend()
    spare.kill()
    kernel = await start(client, one)
    assert await run(kernel.value, "1 + 1", 1) == "2"
    await eventually(lambda: not psutil.pid_exists(parent.pid), "the parent was ended")
    kernel.close()


async def test_a_restarted_daemon_finds_replicas_of_the_old_warm_parent(client: Etcd, host: MakeHost) -> None:
    one = host()
    await waits(client)
    kernel = await start(client, one)
    await run(kernel.run, "a = 1", 1)
    await waits(client)
    (parent,) = parents(one)
    old = [parent, *(p for p in parent.children() if p.pid != pid(one))]
    before = pid(one)
    one.kill()
    await eventually(lambda: not any(p.is_running() for p in old), "the old parent and its spares ended")
    one.start()
    await eventually(lambda: f"found again as process {before}" in one.log.read_text(), "it is found")

    def connected() -> bool:
        return bool(kernel.control("nbos_status_request", {})["content"]["status"] == "ok")

    await eventually(lambda: run(connected), "the new daemon answers")
    assert await run(kernel.value, "a", 2) == "1"
    assert pid(one) == before
    await waits(client)
    second = await start(client, one, "k2")
    assert await run(second.value, "2", 1) == "2"
    os.kill(before, signal.SIGKILL)
    again = await attach(client, one)
    assert await run(again.value, "a", 3) == "1"
    for opened in (kernel, second, again):
        opened.close()


async def test_nothing_is_left_when_the_daemon_is_told_to_stop(client: Etcd, host: MakeHost) -> None:
    one = host()
    await waits(client)
    assert one.process is not None
    family = psutil.Process(one.process.pid).children(recursive=True)
    assert len(family) == 2
    one.kill(signal.SIGTERM)
    assert not psutil.wait_procs(family, timeout=5)[1]
