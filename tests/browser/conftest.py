"""A running `nbos up` and a page in Chromium for each test. What fails here says what is missing and how to
get it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from playwright.async_api import Page, async_playwright

from tests.system.sides import Running, nbos_hub

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshot", action="store_true", help="keep docs/images/notebook.png")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: needs Chromium on the PATH (or its path in NBOS_CHROMIUM)")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path. A machine without one fails these tests, or leaves them out knowingly."""
    asked = os.environ.get("NBOS_CHROMIUM")
    names = [asked] if asked else ["chromium", "chromium-browser", "google-chrome"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail(
            f"no browser: none of {', '.join(names)} is on the PATH. Install Chromium (Debian: apt-get install "
            "chromium), or name it in NBOS_CHROMIUM, or leave these tests out with -m 'not browser'",
            pytrace=False,
        )
    return found


@pytest.fixture(scope="session")
def cluster() -> Iterator[Running]:
    """One `nbos up` for all of these tests; each test has a user of its own."""
    with nbos_hub() as running:
        yield running


@pytest.fixture
async def page(chromium: str, tmp_path: Path) -> AsyncIterator[Page]:
    """A page of a fresh browser profile; a picture of it is kept beside the failure."""
    async with async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=chromium,
            args=list(FLAGS),
            viewport={"width": 1280, "height": 900},
        )
        opened = context.pages[0] if context.pages else await context.new_page()
        yield opened
        await opened.screenshot(path=tmp_path / "last.png")
        print(f"the page at the end: {opened.url}, {tmp_path / 'last.png'}")
        await context.close()


@pytest.fixture
def screenshot(request: pytest.FixtureRequest) -> Path | None:
    """Where to keep a picture for the README, when it was asked for."""
    if not request.config.getoption("--screenshot", default=False):
        return None
    IMAGES.mkdir(parents=True, exist_ok=True)
    return IMAGES / "notebook.png"
