"""Which tests stay together when pytest runs several at a time (`-n 2`), and what `python -m tests` learns of a run."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/browser/", "tests/cluster/", "tests/system/containers/")
"""Folders whose tests share what one session sets up (a browser, images): one process runs all of each."""

# A machine that stalls says nothing about what is tested, however long an example takes.
settings.register_profile("nbos", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nbos")

ONE_TRY = "tests/cluster/test_random_faults.py"

FAILURES = "nbos/failures"


class ByFile(LoadScopeScheduling):
    """One process runs a file's tests, since they share what the file has started."""

    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.split("::", 1)[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


def one_try(report: pytest.TestReport, message: str) -> bool:
    """Whether its failure says something even if it is never seen again: what it does is drawn by chance, and it has
    not only run out of time."""
    drawn = "hypothesis" in report.keywords or report.nodeid.startswith(ONE_TRY)
    return drawn and not message.startswith(("TimeoutError", "Failed: Timeout"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What failed, and with which message; a test that fails in its body and in its teardown is one."""
    failed: dict[str, str] = {}
    drawn: set[str] = set()
    for report in (*terminalreporter.stats.get("failed", ()), *terminalreporter.stats.get("error", ())):
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash is not None else report.longrepr)
        drawn |= {report.nodeid} if one_try(report, message) else set()
        failed[report.nodeid] = "\n".join(filter(None, (failed.get(report.nodeid), message)))
    if (cache := getattr(config, "cache", None)) is not None:  # there is none with -p no:cacheprovider
        cache.set(FAILURES, {"failed": failed, "drawn": sorted(drawn)})
