"""Machines die, are cut off, stall and come back under a notebook that is driven as a browser drives it.

After each test the history is checked: every answered cell's effect exactly once in the namespace that survived, and in
the log under the number of its reply.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.cluster.history import History
from tests.cluster.machines import HOSTS, Machines
from tests.system.channels import Cell
from tests.system.cluster import Notebook, after
from tests.system.hubclient import eventually

pytestmark = pytest.mark.timeout(300)

LONG = "print('begun', flush=True); time.sleep(4)"


async def told(cell: Cell, since: float) -> float:
    """Seconds until the cell's output says that it runs again elsewhere."""
    await cell.text("again", 40)
    return time.monotonic() - since


async def lead(history: History) -> str:
    return (await history.notebook.executor()).host


async def some_cells(history: History, count: int = 5) -> None:
    for _ in range(count):
        assert (await history.run()).status == "ok"


async def test_a_cell_runs_and_holds_its_slice(machines: Machines, history: History) -> None:
    result = await history.run("import nbos_kernel", "print(nbos_kernel.grant())")
    assert result.stdout == "None\n"
    assert await history.notebook.run("%%gpu tpcs=16 mem=20G\nprint(nbos_kernel.grant().tpcs)") == "16\n"
    assert await history.notebook.run("%%gpu 1\nprint(nbos_kernel.grant().tpcs)") == "66\n"
    new = await Notebook.open(machines, "ada")
    assert len({replica.host for replica in await new.settled()}) == 3
    await new.close()


async def test_user_code_reaches_no_other_machine(machines: Machines, history: History) -> None:
    """Neither etcd, nor the hub's API, nor another host's replicas; a router reaches them, as all other tests show."""
    here = await lead(history)
    other = next(m for m in (await history.notebook.model())["members"] if m["host"] != here)
    assert set(other["ports"]) >= {"shell", "iopub", "control", "stdin", "hb"}
    net = machines.network
    places = [(other["ip"], port) for port in (22, *other["ports"].values())]
    places += [(f"{net}.21", 2379), (f"{net}.21", 2380), (f"{net}.10", 8081), (f"{net}.10", 8765), (f"{net}.1", 22)]
    code = (
        "def reach(place):\n try: socket.create_connection(place, 3).close(); return 'open'\n"
        " except OSError as err: return type(err).__name__\n"
        # At a time: where packets are dropped, not refused, each waits for its 3 seconds.
        f"import concurrent.futures\nwith concurrent.futures.ThreadPoolExecutor({len(places)}) as pool:\n"
        f" print(list(pool.map(reach, {places!r})))"
    )
    found = await history.notebook.run(code, 60)
    assert found.count("Error") == len(places), found


async def test_a_host_dies_between_cells(machines: Machines, history: History) -> None:
    async with machines.dead(await lead(history)):
        await some_cells(history)
    await machines.whole()
    await history.notebook.settled(60)
    await some_cells(history)


async def test_a_host_dies_during_a_cell_which_runs_again_elsewhere(machines: Machines, history: History) -> None:
    cell = await history.submit(LONG)
    await cell.cell.text("begun")
    host, since = await lead(history), time.monotonic()
    async with machines.dead(host):
        print(f"told after {await told(cell.cell, since):.1f} s")
        assert (await cell.done()).status == "ok"
        await some_cells(history)


async def test_a_dead_hosts_replicas_are_placed_anew(machines: Machines, history: History) -> None:
    host = await lead(history)
    async with machines.dead(host):

        async def moved() -> bool:
            return host not in {m["host"] for m in (await history.notebook.model())["members"]}

        await eventually(moved, f"no replica is placed on {host}", 60)
        assert len(await history.notebook.settled(60)) == 3
        await some_cells(history)


async def test_a_host_is_cut_off_between_cells(machines: Machines, history: History) -> None:
    async with machines.cut_off(await lead(history)):
        await some_cells(history)
    await machines.whole()
    await some_cells(history)


async def test_a_host_is_cut_off_while_its_replica_holds_the_claim(machines: Machines, history: History) -> None:
    """Its replica goes on, all alone, and ends the cell; what it did there counts for nothing."""
    cell = await history.submit(LONG)
    await cell.cell.text("begun")
    host, since = await lead(history), time.monotonic()
    async with machines.cut_off(host):
        print(f"told after {await told(cell.cell, since):.1f} s")
        result = await cell.done()
        assert result.status == "ok"
        assert await lead(history) != host
        await some_cells(history)
    await machines.whole()
    await some_cells(history)


async def test_a_host_cut_off_for_a_moment_costs_its_cell_nothing(machines: Machines, history: History) -> None:
    cell = await history.submit(LONG)
    await cell.cell.text("begun")
    async with machines.cut_off(await lead(history)):
        await after(1)
    assert (await cell.done()).status == "ok"
    await some_cells(history)


async def test_a_host_sleeps_for_30_seconds_and_wakes(machines: Machines, history: History) -> None:
    cell = await history.submit(LONG)
    await cell.cell.text("begun")
    host, since = await lead(history), time.monotonic()
    async with machines.paused(host):
        print(f"told after {await told(cell.cell, since):.1f} s")
        assert (await cell.done()).status == "ok"
        await some_cells(history)
        await after(max(0.0, since + 30 - time.monotonic()))
    await machines.whole()
    await some_cells(history)
    await history.notebook.settled(60)


@pytest.mark.parametrize("member", ["etcd-1", "etcd-2", "etcd-3"])
async def test_an_etcd_member_dies(machines: Machines, history: History, member: str) -> None:
    """One of the three is the leader."""
    async with machines.dead(member):
        await some_cells(history, 10)
    await some_cells(history)


async def test_gateway_and_hub_are_killed(machines: Machines, history: History) -> None:
    cell = await history.submit(LONG)
    await cell.cell.text("begun")
    machines.kill("hub", "nbos_spawner.gateway")
    machines.kill("hub", "jupyterhub", "--config")
    await some_cells(history, 0)
    assert (await cell.done()).status == "ok"
    await some_cells(history)
    await machines.whole()
    # The user's server was found again: it is the same container.
    assert (await machines.hub.start_server("ada")).user == "ada"
    await some_cells(history)


async def test_the_hub_machine_loses_power(machines: Machines, history: History) -> None:
    """With it the users' servers end; kernels go on and are found again with their variables."""
    async with machines.dead("hub"):
        await after(5)
    await machines.whole(90)
    notebook = history.notebook
    await notebook.channels.close()
    server = await machines.hub.start_server("ada")

    async def found() -> bool:
        return notebook.kernel in {kernel["id"] for kernel in await server.kernels()}

    await eventually(found, "the new server knows the kernel", 30)
    notebook.channels = await server.open(notebook.kernel)
    await some_cells(history)


async def test_a_daemon_is_killed_during_a_cell(machines: Machines, history: History) -> None:
    cell = await history.submit(LONG)
    await cell.cell.text("begun")
    machines.kill(await lead(history), "gpu_daemon")
    result = await cell.done()
    assert (result.status, result.stderr) == ("ok", "")
    await history.notebook.settled(60)
    await some_cells(history)


async def test_two_hosts_of_three_die(machines: Machines, history: History) -> None:
    host = await lead(history)
    other = next(name for name in HOSTS if name != host)
    async with machines.dead(host), machines.dead(other):
        await some_cells(history)
    await machines.whole()
    await history.notebook.settled(60)


async def test_a_host_is_drained_while_cells_run(machines: Machines, history: History) -> None:
    """Nothing fails for it, and the host can then be switched off without anybody's noticing."""
    cell = await history.submit(LONG)
    await cell.cell.text("begun")
    host = await lead(history)
    drained = asyncio.create_task(asyncio.to_thread(machines.nbos, "drain", host, "--wait", "60"))
    result = await cell.done()
    assert (result.status, result.stderr) == ("ok", "")
    await some_cells(history)
    assert "no replica is left there" in await drained
    assert host not in {replica.host for replica in await history.notebook.settled(60)}
    await asyncio.to_thread(machines.nbos, "drain", host, "--undo")
    await some_cells(history)
