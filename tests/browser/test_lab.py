"""The promise of the README, seen by a person in a browser: log in, train, lose the process, go on working."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.browser.lab import SECOND, Notebook, code_notebook, log_in, spawn, stop_server
from tests.system.hubclient import Server, eventually
from tests.system.nbosenv import DISPLAY_NAME, nbos_status, replica_pid, settled
from tests.system.sides import Running

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]

DIGITS = "examples/digits.ipynb"  # `nbos up` puts it into a new user's home
ACCURACY = re.compile(r"accuracy 0\.9\d+")
LAST = 'print(f"accuracy {accuracy(model)'
LONG = "import time\nprint('begun', flush=True)\ntime.sleep(600)"


async def enter(cluster: Running, page: Page, user: str, **answers: str) -> Server:
    """Log in with the password that `nbos up` made, answer the spawn form, wait for JupyterLab."""
    password = (cluster.directory / "password").read_text().strip()
    await log_in(page, cluster.hub.url, user, password)
    await spawn(page, cluster.hub.url, {"replicas": "3", **answers})
    return await cluster.server(user)


async def put(server: Server, path: str, notebook: dict[str, Any]) -> None:
    """Lay a notebook into the user's home, for the kernelspec of NBOS."""
    specs = await server.kernelspecs()
    name = next(name for name, spec in specs.items() if spec["spec"]["display_name"] == DISPLAY_NAME)
    notebook["metadata"]["kernelspec"] = {"name": name, "display_name": DISPLAY_NAME, "language": "python"}
    body = {"type": "notebook", "format": "json", "content": notebook}
    await server.api("PUT", f"contents/{path}", body)


async def connected(server: Server, page: Page, notebook: Notebook) -> None:
    """The page has a websocket to its kernel. (JupyterLab calls a notebook idle before its kernel is there, and asks
    for a kernel when a cell is run then.)"""

    async def websocket() -> bool:
        return any(kernel["connections"] > 0 for kernel in await server.kernels())

    await eventually(websocket, f"{page.url} is connected to a kernel", timeout=60)
    await notebook.idle()


async def kill_executor(cluster: Running, kernel: str) -> int:
    """`kill -9` for the process that `nbos status --json` calls the executor of this kernel."""
    await settled(cluster.hub, kernel)
    pid = replica_pid(await asyncio.to_thread(nbos_status, cluster.directory), kernel, "executor")
    os.kill(pid, signal.SIGKILL)
    return pid


async def test_a_trained_model_survives_its_process_and_its_server(
    cluster: Running, page: Page, screenshot: Path | None
) -> None:
    server = await enter(cluster, page, "ada")
    notebook = await Notebook.open(page, cluster.hub.url, "ada", DIGITS)
    await expect(notebook.kernel_name).to_have_text(DISPLAY_NAME)
    await connected(server, page, notebook)

    await notebook.run_all()
    last = await notebook.cell(LAST)
    await notebook.expect_output(last, ACCURACY, 120 * SECOND)
    await notebook.expect_finished()
    learned = read_accuracy(await notebook.output(last))
    [kernel] = await server.kernels()

    await kill_executor(cluster, kernel["id"])
    assert read_accuracy(await notebook.run_again(last)) == learned
    if screenshot:
        await page.screenshot(path=screenshot)

    await notebook.save()
    await stop_server(page, cluster.hub.url)
    await spawn(page, cluster.hub.url, {"replicas": "3"})
    notebook = await Notebook.open(page, cluster.hub.url, "ada", DIGITS)
    await connected(server, page, notebook)
    assert [found["id"] for found in await server.kernels()] == [kernel["id"]]
    assert read_accuracy(await notebook.run_again(await notebook.cell(LAST))) == learned


async def test_a_long_cell_ends_when_it_is_interrupted(cluster: Running, page: Page) -> None:
    server = await enter(cluster, page, "grace")
    await put(server, "long.ipynb", code_notebook(DISPLAY_NAME, LONG, "print(6 * 7)"))
    notebook = await Notebook.open(page, cluster.hub.url, "grace", "long.ipynb")
    await connected(server, page, notebook)
    long, short = notebook.cells.first, notebook.cells.nth(1)

    await notebook.run(long)
    await notebook.expect_output(long, "begun", 30 * SECOND)
    await notebook.interrupt()
    await notebook.expect_output(long, "KeyboardInterrupt", 30 * SECOND)
    await notebook.run(short)
    await notebook.expect_output(short, "42", 30 * SECOND)


def read_accuracy(text: str) -> str:
    found = ACCURACY.search(text)
    assert found, f"no accuracy in {text!r}"
    return found.group()
