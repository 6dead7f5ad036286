"""A cell prints while its browser, or its Jupyter Server, is away: all of it is there afterwards, in order, once.

The page here is a websocket that a test opens, drops and opens again with the same session, as JupyterLab does;
tests/browser/test_outputs.py has JupyterLab itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.channels import Cell
from tests.system.cluster import KERNEL, Cluster
from tests.system.hubclient import Server, eventually
from tests.system.messages import Message


def prints(enough: str) -> str:
    """A cell that counts until the file `enough` is there, and then makes the file `enough`.done."""
    return f"""
import os, time
i = 0
while not os.path.exists("{enough}"):
    print(i, flush=True)
    i += 1
    time.sleep(0.01)
print("last", i, flush=True)
open("{enough}.done", "w").close()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="nbos-outputs-") as folder:
        one = Cluster(Path(folder) / "state", "--gpus", "0")
        one.start()
        try:
            yield one
        finally:
            assert not one.stop(), "processes were left"


async def server_of(cluster: Cluster, user: str) -> Server:
    await cluster.hub.start_server(user, {"replicas": 2})
    return Server(cluster.hub.as_user(await cluster.hub.user_token(user)), user)


def screen(messages: Sequence[Message]) -> str:
    """The text in an output area after these messages. A page takes none after the cell's end."""
    text = ""
    for message in messages:
        if message.type == "clear_output" and not message.content.get("wait"):
            text = ""
        elif message.type == "status" and message.content["execution_state"] == "idle":
            return text
        elif message.type == "stream":
            text += message.content["text"]
    return text


async def start(server: Server, path: str) -> str:
    """A kernel for the notebook at `path`, working in the user's home; its id."""
    body = {"path": path, "type": "notebook", "name": "", "kernel": {"name": KERNEL}}
    return str((await server.api("POST", "sessions", body, 60))["kernel"]["id"])


async def put(server: Server, path: str, content: str = "") -> None:
    await server.api("PUT", f"contents/{path}", {"type": "file", "format": "text", "content": content})


async def grown(cell: Cell, lines: int = 30) -> None:
    """Until that many more lines have come."""
    target = len(screen(cell.messages).split()) + lines
    await cell.wait(lambda cell: len(screen(cell.messages).split()) >= target, f"{target} lines", 30)


def complete(text: str) -> bool:
    """All that such a cell has printed, nothing twice, nothing else."""
    *numbers, last, count = text.split()
    return last == "last" and numbers == [str(i) for i in range(int(count))]


def singleuser(cluster: Cluster, user: str) -> psutil.Process:
    """The user's Jupyter Server."""
    assert cluster.process is not None
    for process in psutil.Process(cluster.process.pid).children(recursive=True):
        environ = process.environ()
        if environ.get("JUPYTERHUB_USER") == user and any("singleuser" in word for word in process.cmdline()):
            return process
    raise LookupError(f"no server of {user}")


async def test_a_page_that_was_away_is_given_everything_once(cluster: Cluster) -> None:
    server = await server_of(cluster, "ada")
    kernel = await start(server, "some.ipynb")
    page = await server.open(kernel)
    cell = await page.submit(prints("enough"))
    await grown(cell)
    await page.close()
    await asyncio.sleep(1.0)  # time in which the cell prints to nobody
    again = await server.open(kernel, session=page.session)
    again.go_on(page)
    await grown(cell)
    await put(server, "enough")
    result = await cell.result()
    assert complete(screen(result.messages))
    assert result.status == "ok"
    await again.close()
    await server.delete_kernel(kernel)


async def another_server(cluster: Cluster, user: str, how: str) -> Server:
    """The user's server ends, and a new one takes its place."""
    if how == "killed":
        os.kill(singleuser(cluster, user).pid, signal.SIGKILL)
    await cluster.hub.stop_server(user)
    return await server_of(cluster, user)


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_server_that_ends_under_a_printing_cell_costs_no_output(cluster: Cluster, how: str) -> None:
    """The cell goes on after a kill -9, and has ended when the page is back from an orderly stop (an idle culler's)."""
    server = await server_of(cluster, how)
    kernel = await start(server, "some.ipynb")
    page = await server.open(kernel)
    cell = await page.submit(prints("enough"))
    await grown(cell)
    server = await another_server(cluster, how, how)
    await asyncio.wait_for(page.closed.wait(), 10)
    if how == "stopped":
        await put(server, "enough")
        await eventually(lambda: done(server, "enough"), "the cell has ended", 30)
    else:
        await eventually(lambda: busy(server), "the new server knows that it runs (an idle culler looks)", 20)
    again = await server.open(kernel, session=page.session)
    again.go_on(page)
    if how == "killed":
        await grown(cell)
        await put(server, "enough")
    result = await cell.result()
    assert complete(screen(result.messages)), screen(result.messages)[-300:]
    assert result.reply["execution_count"] == 1
    assert (await again.execute("i > 30")).value == "True"
    await again.close()
    await server.delete_kernel(kernel)


FLOOD = """
import os, time
for i in range(12_000):
    print(i, "x" * 10_000, flush=True)
open("flooded", "w").close()
while not os.path.exists("go"):
    time.sleep(0.05)
"""


async def test_a_cell_that_floods_nobody_holds_no_more_than_the_bound(cluster: Cluster) -> None:
    """120 MB, of which 16 are kept: the router is far smaller than what was printed."""
    server = await server_of(cluster, "mia")
    kernel = await start(server, "some.ipynb")
    page = await server.open(kernel)
    cell = await page.submit(FLOOD)
    await cell.text("0 xxx")
    await page.close()
    [router] = [
        child for child in singleuser(cluster, "mia").children() if "nbos_provisioner.router" in child.cmdline()
    ]

    async def flooded() -> bool:
        return "flooded" in [entry["name"] for entry in (await server.api("GET", "contents"))["content"]]

    await eventually(flooded, "the cell has printed all", 120, every=0.5)
    # Once what was on its way has arrived (what comes after the page falls under the server's limit on rates), and
    # memory was given back, though the cell still runs.
    await eventually(lambda: rests(router), "the router has handled all", 60)
    await settles(lambda: router.memory_info().rss, 140_000_000, 30)
    await put(server, "go")
    again = await server.open(kernel, session=page.session)
    again.go_on(page)
    result = await cell.result()
    first, *lines = screen(result.messages).splitlines()
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == list(range(12_000 - len(numbers), 12_000))
    told = re.search(r"NBOS: [0-9,]+ earlier messages of this cell \(([0-9.]+) MB\)", first)
    assert told, first
    assert float(told[1]) == pytest.approx((12_000 - len(numbers)) * 10_006 / 1e6, abs=0.5)
    assert len(numbers) > 1500
    await again.close()
    await server.delete_kernel(kernel)


async def rests(process: psutil.Process) -> bool:
    """It has done next to nothing for a second: heartbeats, no more."""
    before = process.cpu_times()
    await asyncio.sleep(1.0)
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system < 0.03


async def settles(value: Callable[[], int], below: int, timeout: float) -> None:
    """Until `value` is less; what it was at last is told."""
    seen: list[int] = []

    async def less() -> bool:
        seen.append(value())
        return seen[-1] < below

    with contextlib.suppress(TimeoutError):
        await eventually(less, "", timeout, every=0.2)
    assert seen[-1] < below, f"it is {seen[-1]:,} after {timeout:g} s, {max(seen):,} at most"


async def busy(server: Server) -> bool:
    return [kernel["execution_state"] for kernel in await server.kernels()] == ["busy"]


async def done(server: Server, enough: str) -> bool:
    return any(entry["name"] == f"{enough}.done" for entry in (await server.api("GET", "contents"))["content"])


async def test_outputs_of_a_closed_page_are_in_the_file_that_the_next_one_opens(cluster: Cluster) -> None:
    server = await server_of(cluster, "eve")
    await put_notebook(server, "work.ipynb", {"known": prints("enough"), "other": "1"})
    kernel = await start(server, "work.ipynb")
    page = await server.open(kernel)
    cell = await page.submit(prints("enough"), metadata={"cellId": "known"})
    await grown(cell)
    await read(server, "work.ipynb")
    assert (await read(server, "work.ipynb"))["known"]["outputs"] == [], "its own page is there"
    await page.close()

    async def partly() -> str | None:
        outputs = (await read(server, "work.ipynb"))["known"]["outputs"]
        return "".join("".join(output["text"]) for output in outputs) or None

    text = await eventually(partly, "the file holds what was printed", 30)
    assert "this cell still runs" in text
    assert text.startswith("0\n1\n2\n")
    second = await server.open(kernel)
    await put(server, "enough")

    async def whole() -> dict[str, Any] | None:
        known = (await read(server, "work.ipynb"))["known"]
        return None if "still runs" in str(known["outputs"]) else known

    known = await eventually(whole, "the file holds the end", 30)
    assert [output["name"] for output in known["outputs"]] == ["stdout"]
    [output] = known["outputs"]
    assert complete("".join(output["text"]))
    assert known["execution_count"] == 1
    assert (await read(server, "work.ipynb"))["other"]["outputs"] == []
    await second.close()
    await server.delete_kernel(kernel)


async def put_notebook(server: Server, path: str, cells: dict[str, str]) -> None:
    made = [
        {"cell_type": "code", "id": key, "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for key, source in cells.items()
    ]
    content = {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    await server.api("PUT", f"contents/{path}", {"type": "notebook", "format": "json", "content": content})


async def read(server: Server, path: str) -> dict[str, Any]:
    """The notebook's cells by id, as a page that opens it is given them."""
    model = await server.api("GET", f"contents/{path}?type=notebook&content=1")
    return {cell["id"]: cell for cell in model["content"]["cells"]}
