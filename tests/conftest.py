"""Which tests stay together when pytest runs several at a time (`-n 2`)."""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/browser/", "tests/cluster/", "tests/system/containers/")
"""Folders whose tests share what one session sets up (a browser, images): one process runs all of each."""


class ByFile(LoadScopeScheduling):
    """One process runs a file's tests, since they share what the file has started."""

    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.split("::", 1)[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)
