"""Cells marked with `%%replay` on a real cluster: after a kill -9 of the executor, what was not replicated is there.

Each run of a marked cell leaves its process id in a file, so that it is known where, and how often, it ran.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.system.channels import Result
from tests.system.cluster import Cluster, Notebook

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("replay") / "state")
    cluster.start()
    yield cluster
    assert cluster.stop() == []


@pytest_asyncio.fixture(loop_scope="module")
async def notebook(cluster: Cluster) -> AsyncIterator[Notebook]:
    notebook = await Notebook.open(cluster, "ada")
    await notebook.run("import os, socket, time")
    yield notebook
    await notebook.close()


async def after_a_kill(notebook: Notebook, code: str) -> Result:
    """The first cell after the executor's end."""
    await notebook.settled()
    os.kill((await notebook.executor()).pid, signal.SIGKILL)
    return await notebook.channels.execute(code, 60)


def noting(path: Path) -> str:
    """The first lines of a marked cell that notes where it ran."""
    return f"%%replay\nwith open({str(path)!r}, 'a') as ran:\n    print(os.getpid(), file=ran)\n"


async def test_live_objects_are_there_after_one_failover_and_after_two(notebook: Notebook, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    await notebook.run("async def numbers():\n    yield 4\n    yield 5\nrows = ['a', 'b']")
    first = await notebook.channels.execute(noting(ran) + "left, right = socket.socketpair()\nprint('loud')")
    assert "'left' is not replicated; its %%replay cell makes it anew" in first.stderr
    await notebook.run("%%replay\nfrom concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)")
    await notebook.run("%%replay\nstream = numbers()\nfour = await anext(stream)\nsend = (left.send(r) for r in rows)")
    await notebook.run("rows.append('c'); four = 'kept'")
    use = "list(pool.map(left.send, [b'x', b'y'])), right.recv(9), await anext(stream), four, os.getpid()"
    count = int(await notebook.run("len(In)"))
    for failover in (1, 2):
        result = await after_a_kill(notebook, use)
        assert "NBOS: replayed 3 cells for left, pool, right, send, stream in " in result.stderr, result.error
        assert ("loud" in result.stdout, result.reply["execution_count"]) == (False, count)
        pid = result.value.rstrip(")").rpartition(", ")[2]
        assert result.value == f"([1, 1], b'xy', 5, 'kept', {pid})"
        assert await notebook.run("len(rows)") == "3"
        lines = ran.read_text().split()
        assert (len(lines), lines[-1]) == (1 + failover, pid), "only the new executor runs it, and once"
        state = (await notebook.channels.execute("%nbos state")).messages
        assert any("replayed" in str(message.content.get("data")) for message in state)
        count += 3  # this one, the length and the state


async def test_a_replay_that_fails_leaves_its_name_lost_and_says_why(notebook: Notebook, tmp_path: Path) -> None:
    door = tmp_path / "door"
    door.touch()
    await notebook.run(f"%%replay\nopen({str(door)!r}).close()\nlocked = (i for i in [1])")
    await notebook.run("%%replay\nopened = (i for i in [2])")
    await notebook.run("unmarked = (i for i in [3])")
    door.unlink()
    result = await after_a_kill(notebook, "next(opened), locked")
    assert result.error.startswith("NotReplicatedError: name 'locked'")
    assert "its %%replay cell failed when it ran again: FileNotFoundError" in result.error
    assert "locked not made again: its %%replay cell failed" in result.stderr
    assert (await notebook.channels.execute("unmarked")).error.startswith("NotReplicatedError: name 'unmarked'")


@pytest.mark.parametrize("wait", ["time.sleep(60)", "import asyncio; await asyncio.sleep(60)"])
async def test_a_long_replay_says_what_it_waits_for_and_can_be_interrupted(
    notebook: Notebook, tmp_path: Path, wait: str
) -> None:
    slow = tmp_path / "slow"
    await notebook.run(f"%%replay\nif os.path.exists({str(slow)!r}): {wait}\nlate = (i for i in [1])")
    slow.touch()
    await notebook.settled()
    os.kill((await notebook.executor()).pid, signal.SIGKILL)
    cell = await notebook.channels.submit("print('ran')")
    await cell.text("this cell waits: after a failover 1 cell marked %%replay run again for late")
    await notebook.server.interrupt(notebook.kernel)
    result = await cell.result()
    assert (result.error, result.stdout, result.states) == ("KeyboardInterrupt: ", "", ["busy", "idle"])
    assert "its %%replay cell was interrupted" in (await notebook.channels.execute("late")).error
    assert await notebook.run("late = 1\nlate + 1") == "2"


async def test_a_marked_cell_that_ends_its_replica_does_not_end_the_kernel(notebook: Notebook, tmp_path: Path) -> None:
    deadly = tmp_path / "deadly"
    await notebook.run(
        f"%%replay\nif os.path.exists({str(deadly)!r}): os.kill(os.getpid(), 9)\nfatal = (i for i in [1])"
    )
    deadly.touch()
    assert (await after_a_kill(notebook, "1 + 1")).error.startswith("NBOSReplicaDied")
    assert (await notebook.channels.execute("2 + 2")).error.startswith("NBOSReplicaDied")
    assert await notebook.run("3 + 3") == "6"
    assert "the last 2 cells ended with their replica" in (await notebook.channels.execute("fatal")).error
