"""Every row of the table "When something breaks" (README) that can happen on one machine, for real: the processes are
killed, paused and started again under a notebook that is driven as a browser drives it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nbos_kernel.precedence import BEHIND
from tests.system.channels import Result
from tests.system.cluster import Cluster, Notebook, after, gone, paused
from tests.system.hubclient import eventually

pytestmark = pytest.mark.timeout(240)

AUTOGROUP = Path("/proc/self/autogroup")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("failures") / "state", "--memory-limit", "600M")
    cluster.start()
    yield cluster
    assert cluster.stop() == []


@pytest.fixture
async def notebook(cluster: Cluster) -> AsyncIterator[Notebook]:
    notebook = await Notebook.open(cluster, "ada")
    await notebook.run("x = 40")
    await notebook.settled()
    yield notebook
    await notebook.close()


def nice(pid: int) -> int:
    """Of the process's session."""
    return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])


def once(result: Result) -> None:
    """One busy, one idle, one reply: never two, whatever the replicas did."""
    assert result.states == ["busy", "idle"]


async def test_three_replicas_stand_on_three_hosts(notebook: Notebook) -> None:
    assert len({replica.host for replica in await notebook.settled()}) == 3


async def test_the_executor_killed_between_cells_costs_nothing(notebook: Notebook) -> None:
    before = await notebook.executor()
    os.kill(before.pid, signal.SIGKILL)
    result = await notebook.channels.execute("x + 2")
    assert result.value == "42"
    once(result)
    assert (await notebook.executor()).index != before.index


async def test_every_replica_takes_over_in_turn(notebook: Notebook) -> None:
    for n in range(6):
        await notebook.run(f"y = x + {n}")
        await notebook.settled()
        os.kill((await notebook.executor()).pid, signal.SIGKILL)
        assert await notebook.run("y") == str(40 + n)


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel shares the processor among processes only")
async def test_standbys_use_the_processor_after_the_executor_until_they_take_over(notebook: Notebook) -> None:
    for _ in range(2):
        await notebook.run("value = list(range(1000))")
        first = await notebook.executor()
        pids = [replica.pid for replica in await notebook.settled()]

        async def in_order(leads: int = first.pid, pids: list[int] = pids) -> bool:
            return {pid: nice(pid) for pid in pids} == {pid: 0 if pid == leads else BEHIND for pid in pids}

        await eventually(in_order, "the executor first", 10)
        os.kill(first.pid, signal.SIGKILL)


async def test_the_executor_killed_during_a_cell_ends_it_with_an_error_that_says_so(
    notebook: Notebook,
) -> None:
    await notebook.run("import time")
    await notebook.settled()
    cell = await notebook.channels.submit("x = 99; print('begun', flush=True); time.sleep(60)")
    await cell.text("begun")
    os.kill((await notebook.executor()).pid, signal.SIGKILL)
    result = await cell.result(20)
    once(result)
    assert result.error.startswith("NBOSReplicaDied")
    assert "SIGKILL" in result.error
    assert await notebook.run("x") == "40"


async def test_a_segfault_ends_its_cell_only(notebook: Notebook) -> None:
    result = await notebook.channels.execute("import ctypes; x = 41; ctypes.string_at(0)")
    once(result)
    assert "SIGSEGV" in result.error
    assert await notebook.run("x") == "40"


async def test_a_cell_that_exits_its_process_ends_with_an_error(notebook: Notebook) -> None:
    result = await notebook.channels.execute("import os; os._exit(3)")
    once(result)
    assert "NBOSReplicaDied" in result.error
    assert await notebook.run("x") == "40"


async def test_a_cell_that_exhausts_its_memory_limit_ends_with_an_error_that_names_the_limit(
    notebook: Notebook,
) -> None:
    result = await notebook.channels.execute("import time; x = 41; held = bytearray(700 << 20); time.sleep(30)")
    once(result)
    assert result.error.startswith("NBOSReplicaDied")
    assert "of 0.59 GiB memory" in result.error
    assert await notebook.run("x") == "40"


async def test_a_standby_killed_is_not_felt_and_comes_back(notebook: Notebook) -> None:
    lead = await notebook.executor()
    standby = next(r for r in await notebook.settled() if r.index != lead.index)
    os.kill(standby.pid, signal.SIGKILL)
    result = await notebook.channels.execute("x = 7")
    once(result)
    assert result.stderr == ""
    there = {r.index: r for r in await notebook.settled()}
    assert there[standby.index].pid != standby.pid


async def test_all_replicas_killed_come_back_from_the_log(notebook: Notebook) -> None:
    await notebook.run("big = list(range(100_000)); x = 5")
    for replica in await notebook.settled():
        os.kill(replica.pid, signal.SIGKILL)
    assert await notebook.run("x + len(big)") == "100005"


async def test_a_daemon_killed_between_cells_keeps_its_replicas(cluster: Cluster, notebook: Notebook) -> None:
    lead = await notebook.executor()
    os.kill(cluster.daemon_pid(lead.host), signal.SIGKILL)
    assert await notebook.run("x + 1") == "41"
    there = {r.index: r.pid for r in await notebook.settled()}
    assert there[lead.index] == lead.pid


async def test_a_daemon_killed_during_a_cell_does_not_end_it(cluster: Cluster, notebook: Notebook) -> None:
    await notebook.run("import time")
    lead = await notebook.executor()
    cell = await notebook.channels.submit("print('begun', flush=True); time.sleep(4); x = 77; print('done')")
    await cell.text("begun")
    os.kill(cluster.daemon_pid((await notebook.executor()).host), signal.SIGKILL)
    result = await cell.result(40)
    once(result)
    assert (result.status, "done" in result.stdout) == ("ok", True)
    await notebook.settled()
    os.kill((await notebook.executor()).pid, signal.SIGKILL)
    assert await notebook.run("x") == "77"
    assert lead.pid > 0


async def test_a_host_cut_off_during_a_cell_runs_it_again_elsewhere_and_is_fenced(
    cluster: Cluster, notebook: Notebook
) -> None:
    await notebook.run("import time, os")
    await notebook.settled()
    cell = await notebook.channels.submit(
        "x += 1; print('begun', os.getpid(), flush=True); time.sleep(3); print('ended', os.getpid())"
    )
    await cell.text("begun")
    lead = await notebook.executor()
    with paused(cluster.daemon_pid(lead.host), lead.pid):
        result = await cell.result(60)
        once(result)
        assert result.status == "ok"
        assert f"ended {lead.pid}" not in result.stdout
        assert "again" in result.stderr
    assert await notebook.run("x") == "41"
    await notebook.settled()
    assert await notebook.run("x") == "41"


async def test_the_gateway_killed_is_not_felt(cluster: Cluster, notebook: Notebook) -> None:
    gateway = cluster.gateway()
    with paused(cluster.hub_process().pid):  # so that nobody starts the gateway again meanwhile
        gateway.kill()
        await gone(gateway.pid)
        assert await notebook.run("x + 1") == "41"
    await eventually(lambda: _answers(cluster), "the gateway answers again", 60)


async def test_the_hub_killed_is_not_felt(cluster: Cluster, notebook: Notebook) -> None:
    hub = cluster.hub_process()
    hub.kill()
    await gone(hub.pid)
    assert await notebook.run("x + 1") == "41"
    await eventually(lambda: _answers(cluster), "hub and gateway answer again", 60)
    assert await notebook.run("x + 2") == "42"


async def _answers(cluster: Cluster) -> bool:
    try:
        await asyncio.to_thread(cluster.status)
    except RuntimeError:
        return False
    return True


async def test_the_users_server_restarted_finds_its_kernel_with_its_variables(
    cluster: Cluster, notebook: Notebook
) -> None:
    before = {r.index: r.pid for r in await notebook.settled()}
    await notebook.channels.close()
    await cluster.hub.stop_server("ada")
    await cluster.hub.start_server("ada")
    await _has_kernel(notebook)
    notebook.channels = await notebook.server.open(notebook.kernel)
    assert await notebook.run("x") == "40"
    assert {r.index: r.pid for r in await notebook.settled()} == before


async def test_the_users_server_killed_finds_its_kernel_with_its_variables(
    cluster: Cluster, notebook: Notebook
) -> None:
    server = cluster.user_server("ada")
    server.kill()
    await gone(server.pid)
    await notebook.channels.close()

    async def noticed() -> bool:
        return not (await cluster.hub.api("GET", "users/ada"))["servers"]

    await eventually(noticed, "the hub notices that the server is gone", 60)
    await cluster.hub.start_server("ada")
    await _has_kernel(notebook)
    notebook.channels = await notebook.server.open(notebook.kernel)
    assert await notebook.run("x") == "40"


async def _has_kernel(notebook: Notebook) -> None:
    async def there() -> bool:
        return notebook.kernel in [kernel["id"] for kernel in await notebook.server.kernels()]

    await eventually(there, f"the new server has kernel {notebook.kernel}", 30)


async def test_etcd_away_lets_cells_run_on_and_new_ones_wait_and_say_why(cluster: Cluster, notebook: Notebook) -> None:
    await notebook.run("import time")
    running = await notebook.channels.submit("print('begun', flush=True); time.sleep(3); x = 50; print('done')")
    await running.text("begun")
    with paused(cluster.etcd().pid):
        assert (await running.result(20)).status == "ok"
        waiting = await notebook.channels.submit("x + 1")
        await waiting.text("etcd", 20)
        await after(15)
        assert waiting.reply is None
    result = await waiting.result(40)
    once(result)
    assert result.value == "51", result


async def test_a_long_replication_is_seen_in_its_cell_and_in_the_one_that_waits(
    cluster: Cluster, notebook: Notebook
) -> None:
    await notebook.run("import time")
    slow = await notebook.channels.submit("print('begun', flush=True); time.sleep(1); seen = 'x' * 5000")
    await slow.text("begun")
    with paused(cluster.etcd().pid):
        assert (await slow.result(20)).status == "ok"
        assert "NBOS" not in slow.written()
        waiting = await notebook.channels.submit("len(seen)")
        await slow.text("NBOS: replicating 4.9 KiB of seen", 20)
        await waiting.text("waiting: replicating 4.9 KiB of seen", 20)
        await waiting.text("etcd is away", 20)
    result = await waiting.result(40)
    assert result.value == "5000", result  # leases ended as the cell began; nobody died, so its reply is not lost
    once(result)
    await slow.text("NBOS: replicated 4.9 KiB of seen in", 20)
    once(await slow.result())
    shown = [message for message in slow.messages if message.type.endswith("display_data")]
    assert [message.type for message in shown] == ["display_data", *["update_display_data"] * (len(shown) - 1)]
    assert len({message.content["transient"]["display_id"] for message in shown}) == 1
    assert slow.idle is not None
    assert slow.idle.at < shown[0].at

    async def with_standbys() -> dict[str, str] | None:
        """While etcd stood still the standbys' hosts counted as lost; they are back a moment later."""
        told = await notebook.channels.execute("%nbos state")
        (table,) = [message.content["data"] for message in told.outputs if message.type == "display_data"]
        return table if "of memory left" in table["text/plain"] else None

    table = await eventually(with_standbys, "the standbys and their memory are told", 20)
    assert "seen  [str, 5,000]" in table["text/plain"]
    assert "standby: replica" in table["text/plain"]
    assert re.search(r"the blob store .*: [0-9.]+ GiB left", table["text/plain"])
    assert "<table>" in table["text/html"]


async def test_etcd_killed_and_started_again_loses_nothing(cluster: Cluster, notebook: Notebook) -> None:
    etcd = cluster.etcd()
    etcd.kill()
    await gone(etcd.pid)
    assert await notebook.run("x = x + 1; x", 60) == "41"
    await notebook.settled()
    os.kill((await notebook.executor()).pid, signal.SIGKILL)
    assert await notebook.run("x") == "41"


async def test_restart_by_the_user_empties_the_namespace_and_keeps_the_id(notebook: Notebook) -> None:
    await notebook.server.restart(notebook.kernel)
    result = await notebook.channels.execute("x")
    assert result.error.startswith("NameError")
    assert await notebook.run("x = 1; x") == "1"


async def test_restart_ends_a_cell_that_does_not_listen(notebook: Notebook) -> None:
    stuck = await notebook.channels.submit(
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(500)"
    )
    await stuck.text("begun")
    await notebook.server.restart(notebook.kernel)
    assert await notebook.run("2 + 2") == "4"


async def test_interrupt_ends_a_long_cell(notebook: Notebook) -> None:
    cell = await notebook.channels.submit("import time; print('begun', flush=True); time.sleep(60)")
    await cell.text("begun")
    await notebook.server.interrupt(notebook.kernel)
    result = await cell.result(10)
    assert result.error.startswith("KeyboardInterrupt")
    assert await notebook.run("x") == "40"


async def test_a_value_that_cannot_be_replicated_is_named_at_once_and_after_a_failover(
    notebook: Notebook,
) -> None:
    result = await notebook.channels.execute("gen = (i for i in range(3)); y = 5")
    assert "gen" in result.stderr
    assert "gen" in (await eventually(lambda: _lost(notebook), "the status names what is lost", 10))
    os.kill((await notebook.executor()).pid, signal.SIGKILL)
    assert await notebook.run("y") == "5"
    touched = await notebook.channels.execute("next(gen)")
    assert "gen" in touched.error
    assert "generator" in touched.error


async def _lost(notebook: Notebook) -> dict[str, str] | None:
    return (await notebook.model())["lost"] or None


async def test_everything_stopped_and_started_again_brings_the_kernels_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cluster = Cluster(tmp_path_factory.mktemp("again") / "state")
    cluster.start()
    try:
        notebook = await Notebook.open(cluster, "grace")
        await notebook.run("import math; xs = [1, 2]; ys = xs; f = lambda: math.pi")
        await notebook.channels.close()
        assert cluster.stop() == []
        cluster.start()
        await cluster.hub.start_server("grace")
        await _has_kernel(notebook)
        notebook.channels = await notebook.server.open(notebook.kernel)
        assert await notebook.run("xs.append(3); (ys, round(f(), 2))") == "([1, 2, 3], 3.14)"
        await notebook.close()
    finally:
        assert cluster.stop() == []
