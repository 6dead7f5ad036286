"""`python -m tests`: lint, format, types, then every test; the exit code is the first failure's.

Tests run two files at a time (most of them wait for processes), those of the compose cluster by themselves afterwards.
Arguments are passed on to one pytest (`python -m tests tests/unit`). A few failures are run once more, alone, since a
machine that stalls for a second can fail a test that starts processes; what passes then is named as unsteady. What
chance found (hypothesis, random faults) gets no second try. Whatever failed is told once more at the very end, with its
message, so that the end of a log is enough to know it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CHECKS = (
    ("lint", ["ruff", "check", "."]),
    ("format", ["ruff", "format", "--check", "."]),
    ("types", ["mypy"]),
)
MOST = 12
"""More failures than this are no stall. Some hundreds of the 2,100 tests start processes and wait with a deadline; when
the machine stands still for a few seconds, what two files have in hand at that moment can fail, several tests in a row
where they share a cluster, and half an hour has room for more than one such moment. A fault of the product in what all
of them use fails dozens."""

PHASES = (
    ("tests", ["-n", "2", "--ignore", "tests/cluster"]),
    ("tests of the compose cluster", ["tests/cluster"]),
)

FAILURES = Path(".pytest_cache/v/nbos/failures")
"""Written by tests/conftest.py: the last run's failures and their messages, and which of them chance found."""

HEAD, TAIL = 300, 900
"""Characters of a message that are told: what was expected stands at its beginning, a process's words at its end."""


def run(name: str, module: list[str]) -> int:
    print(f"== {name}: {' '.join(module)}", flush=True)
    return subprocess.run([sys.executable, "-m", *module], check=False).returncode


@dataclass(frozen=True)
class Outcome:
    """code: pytest's. failed: the message of each test that failed. drawn: those of them that chance found."""

    code: int
    failed: dict[str, str]
    drawn: list[str]


def pytest(name: str, arguments: list[str]) -> Outcome:
    FAILURES.unlink(missing_ok=True)
    code = run(name, ["pytest", *arguments])
    return Outcome(code, **json.loads(FAILURES.read_text())) if FAILURES.exists() else Outcome(code, {}, [])


def short(message: str) -> str:
    if len(message) <= HEAD + TAIL:
        return message
    return f"{message[:HEAD]}\n[{len(message) - HEAD - TAIL} characters]\n{message[-TAIL:]}"


def tests(name: str, arguments: list[str]) -> tuple[int, list[str]]:
    """(exit code, what is to be told at the end)"""
    first = pytest(name, arguments)
    told = [f"FAILED {test}\n{short(message)}" for test, message in sorted(first.failed.items())]
    once_more = sorted(first.failed.keys() - set(first.drawn))
    if first.code != 1 or not 0 < len(once_more) <= MOST:
        return first.code, told
    second = pytest("once more", once_more)
    told += [f"FAILED again, alone: {test}\n{short(message)}" for test, message in sorted(second.failed.items())]
    steady = sorted(set(once_more) - second.failed.keys())
    if steady and second.code in (0, 1):
        told.append("unsteady, failed once and passed alone: " + ", ".join(steady))
    return second.code or int(bool(first.drawn)), told


def main() -> int:
    codes = [run(name, module) for name, module in CHECKS]
    told: list[str] = []
    phases = (("tests", sys.argv[1:]),) if sys.argv[1:] else PHASES
    for name, arguments in phases:
        code, lines = tests(name, arguments)
        codes.append(code)
        told += lines
    if told:
        print("== what failed", *told, sep="\n", flush=True)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
