"""JupyterHub's pages and JupyterLab's notebook as a person uses them: by what they see and click.

Guarantees: every wait is for something visible, with a deadline; nothing here knows of NBOS, so that the
same hands drive a stock JupyterHub.
"""

from __future__ import annotations

import re
from typing import Any

from playwright.async_api import Locator, Page, expect

SECOND = 1000.0
START = 90 * SECOND
"""For what starts processes: a server, a kernel, JupyterLab's first page."""


async def log_in(page: Page, hub_url: str, user: str, password: str) -> None:
    await page.goto(f"{hub_url}/hub/login")
    await page.fill("#username_input", user)
    await page.fill("#password_input", password)
    await page.click("#login_submit")
    await page.wait_for_url(re.compile(r"/hub/(home|spawn)|/user/"), timeout=START)


async def spawn(page: Page, hub_url: str, answers: dict[str, str]) -> None:
    """Fill in the options form (fields by their name), start, and wait for JupyterLab."""
    await page.goto(f"{hub_url}/hub/spawn")
    if answers:
        await page.wait_for_selector("form#spawn_form")
        for name, value in answers.items():
            await page.fill(f"form#spawn_form [name={name}]", value)
        await page.click("form#spawn_form [type=submit]")
    await page.wait_for_url(re.compile(r"/user/[^/]+/(lab|tree)"), timeout=START)


async def stop_server(page: Page, hub_url: str) -> None:
    """The hub's home page: "Stop My Server", until it has stopped."""
    await page.goto(f"{hub_url}/hub/home")
    await page.click("#stop")
    await expect(page.locator("#start")).to_contain_text("Start My Server", timeout=START)


class Notebook:
    """One notebook, open in JupyterLab."""

    def __init__(self, page: Page) -> None:
        self.page = page

    @classmethod
    async def open(cls, page: Page, hub_url: str, user: str, path: str) -> Notebook:
        """Open the file, which also starts (or finds) the kernel that its metadata names."""
        await page.goto(f"{hub_url}/user/{user}/lab/tree/{path}?reset")
        notebook = cls(page)
        await expect(notebook.cells.first).to_be_visible(timeout=START)
        await notebook.dismiss_news()
        return notebook

    async def dismiss_news(self) -> None:
        """JupyterLab asks once whether it may fetch news: no."""
        answer = self.page.get_by_role("button", name="No", exact=True)
        if await answer.count():
            await answer.first.click()

    @property
    def panel(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    @property
    def cells(self) -> Locator:
        return self.panel.locator(".jp-Notebook .jp-CodeCell")

    async def cell(self, source: str) -> Locator:
        """The code cell that holds this text. JupyterLab draws a long notebook bit by bit: scroll until it is there."""
        found = self.cells.filter(has_text=source)
        await self.panel.locator(".jp-WindowedPanel-outer, .jp-Notebook").first.hover()
        for _ in range(100):
            if await found.count():
                break
            await self.page.mouse.wheel(0, 400)
            await self.page.evaluate("() => new Promise(requestAnimationFrame)")
        await expect(found).to_have_count(1, timeout=START)
        await found.scroll_into_view_if_needed()
        return found

    @property
    def kernel_name(self) -> Locator:
        return self.panel.locator(".jp-Toolbar .jp-KernelName, .jp-Toolbar .jp-Toolbar-kernelName").first

    async def idle(self) -> None:
        """The kernel's indicator shows that it is connected and idle."""
        sign = self.panel.locator(".jp-Toolbar .jp-Notebook-ExecutionIndicator").first
        await expect(sign).to_have_attribute("data-status", "idle", timeout=START)

    async def menu(self, name: str, item: str) -> None:
        bar = self.page.locator("#jp-MainMenu")
        await bar.get_by_role("menuitem", name=name, exact=True).click()
        await self.page.locator(".lm-Menu").get_by_role("menuitem", name=item).first.click()

    async def run_all(self) -> None:
        await self.menu("Run", "Run All Cells")

    async def run(self, cell: Locator) -> None:
        """Click into the cell and press Ctrl+Enter."""
        await cell.locator(".jp-InputArea-editor").click()
        await self.page.keyboard.press("Control+Enter")

    async def run_again(self, cell: Locator, timeout: float = START) -> str:
        """Run the cell and wait until it has got a new number; its output."""
        before = await self.number(cell)
        await self.run(cell)
        prompt = cell.locator(".jp-InputArea-prompt")
        changed = re.compile(rf"^\[(?!{before}\])\d+\]:$")
        await expect(prompt).to_have_text(changed, timeout=timeout)
        return await self.output(cell)

    async def number(self, cell: Locator) -> str:
        """The execution count at its side, `*` while it runs."""
        text = (await cell.locator(".jp-InputArea-prompt").inner_text()).strip()
        return text.strip("[]: ")

    async def output(self, cell: Locator) -> str:
        return "\n".join(await cell.locator(".jp-OutputArea-output").all_inner_texts())

    async def expect_output(self, cell: Locator, text: str | re.Pattern[str], timeout: float) -> None:
        """Wait until the cell's output area holds `text`; `timeout` in milliseconds."""
        await expect(cell.locator(".jp-OutputArea").first).to_contain_text(text, timeout=timeout)

    async def expect_finished(self, timeout: float = START) -> None:
        """Wait until every code cell has a number."""
        for i in range(await self.cells.count()):
            prompt = self.cells.nth(i).locator(".jp-InputArea-prompt")
            await expect(prompt).to_have_text(re.compile(r"^\[\d+\]:$"), timeout=timeout)

    async def interrupt(self) -> None:
        await self.panel.locator('[data-command="notebook:interrupt-kernel"]').first.click()

    async def save(self) -> None:
        await self.page.keyboard.press("Control+s")


def code_notebook(kernel: str, *sources: str) -> dict[str, Any]:
    """A notebook for the kernelspec `kernel` with these code cells, as the Contents API takes it."""
    cells: list[dict[str, Any]] = [
        {"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "source": source, "outputs": [],
         "execution_count": None}
        for i, source in enumerate(sources)
    ]  # fmt: skip
    spec = {"name": kernel, "display_name": kernel, "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}
