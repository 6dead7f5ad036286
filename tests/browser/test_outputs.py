"""A notebook's page is away while its cell prints: seen by a person who comes back, nothing is missing.

The page's own WebSockets are noted, so that a test can break them off as a sleeping laptop does.
"""

from __future__ import annotations

import os
import signal

import psutil
import pytest
from playwright.async_api import Locator, Page, expect

from tests.browser.lab import START, Notebook, code_notebook
from tests.browser.test_lab import connected, enter, put
from tests.system.hubclient import Server, eventually
from tests.system.nbosenv import DISPLAY_NAME
from tests.system.sides import Running

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]

PRINTS = """
import os, time
i = 0
while not os.path.exists("enough"):
    print(i, flush=True)
    i += 1
    time.sleep(0.05)
print("last", i)
"""

NOTED = """
window.nbosSockets = []; window.nbosAway = false;
window.WebSocket = class extends WebSocket {
    constructor(url, protocols) {
        super(window.nbosAway ? "ws://127.0.0.1:9/" : url, protocols);
        window.nbosSockets.push(this);
    }
};
"""


async def begin(cluster: Running, page: Page, user: str) -> tuple[Server, Notebook]:
    """A page whose notebook's first cell prints."""
    await page.add_init_script(NOTED)
    server = await enter(cluster, page, user)
    await put(server, "long.ipynb", code_notebook(DISPLAY_NAME, PRINTS))
    notebook = await Notebook.open(page, cluster.hub.url, user, "long.ipynb")
    await connected(server, page, notebook)
    await notebook.run(notebook.cells.first)
    await until(notebook.cells.first, 20)
    return server, notebook


async def until(cell: Locator, number: int) -> None:
    """The cell shows this number."""
    await expect(cell.locator(".jp-OutputArea").first).to_contain_text(f"\n{number}\n", timeout=START)


async def shown(cell: Locator) -> list[int]:
    """The numbers that the cell shows, from its text and not its drawing."""
    text = "\n".join(await cell.locator(".jp-OutputArea-output pre").all_text_contents())
    return [int(word) for word in text.split() if word.isdigit()]


async def enough(server: Server) -> None:
    await server.api("PUT", "contents/enough", {"type": "file", "format": "text", "content": ""})


async def expect_all(notebook: Notebook) -> None:
    """Every number is there, once, and the cell has its own."""
    cell = notebook.cells.first
    await notebook.expect_output(cell, "last", START)
    *numbers, last = await shown(cell)
    assert numbers == list(range(last))
    await notebook.expect_finished()


async def test_a_page_that_comes_back_has_all(cluster: Running, page: Page) -> None:
    server, notebook = await begin(cluster, page, "lin")
    await page.evaluate("() => { nbosAway = true; nbosSockets.forEach(socket => socket.close(4000)) }")

    async def standstill() -> int | None:
        """What it shows last, once that is the same a second later: a slow page still draws what it had received."""
        last = (await shown(notebook.cells.first))[-1]
        await page.wait_for_timeout(1000)
        return last if (await shown(notebook.cells.first))[-1] == last else None

    before = await eventually(standstill, "nothing reaches the page any more", 30)
    await page.wait_for_timeout(2000)  # the absence itself
    assert (await shown(notebook.cells.first))[-1] == before
    await page.evaluate("() => { nbosAway = false }")
    await until(notebook.cells.first, before + 60)
    await enough(server)
    await expect_all(notebook)


async def test_a_page_closed_and_opened_again_has_all_also_from_another_server(cluster: Running, page: Page) -> None:
    """The first server is killed while the page is closed."""
    server, notebook = await begin(cluster, page, "mae")
    seen = (await shown(notebook.cells.first))[-1]
    await page.goto("about:blank")
    os.kill(singleuser(cluster, "mae").pid, signal.SIGKILL)
    await cluster.hub.stop_server("mae")
    server = await cluster.server("mae")
    notebook = await Notebook.open(page, cluster.hub.url, "mae", "long.ipynb")
    await until(notebook.cells.first, seen + 20)
    await notebook.expect_output(notebook.cells.first, "this cell still runs", START)
    await enough(server)
    await eventually(lambda: is_idle(server), "the cell has ended", 30)
    notebook = await Notebook.open(page, cluster.hub.url, "mae", "long.ipynb")
    await expect_all(notebook)


async def is_idle(server: Server) -> bool:
    return all(kernel["execution_state"] == "idle" for kernel in await server.kernels())


def singleuser(cluster: Running, user: str) -> psutil.Process:
    for process in cluster.process.children(recursive=True):
        if process.environ().get("JUPYTERHUB_USER") == user and "singleuser" in " ".join(process.cmdline()):
            return process
    raise LookupError(f"no server of {user}")
