"""`python -m tests`: lint, format, types, then every test; the exit code is the first failure's.

Tests run two files at a time (most of them wait for processes), those of the compose cluster by themselves afterwards.
Arguments are passed on to one pytest (`python -m tests tests/unit`). A few failures among the tests that start real
processes are run once more, alone, since a machine that stalls for a second can fail them; what passes then is named as
unsteady. Unit tests get one try.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHECKS = (
    ("lint", ["ruff", "check", "."]),
    ("format", ["ruff", "format", "--check", "."]),
    ("types", ["mypy"]),
)
SECOND_TRY = ("tests/system/", "tests/browser/", "tests/cluster/test_faults.py", "tests/cluster/test_disk_and_clock.py")
MOST = 3
"""More failures than this are no stall."""

PHASES = (
    ("tests", ["-n", "2", "--ignore", "tests/cluster"]),
    ("tests of the compose cluster", ["tests/cluster"]),
)

LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")


def run(name: str, module: list[str]) -> int:
    print(f"== {name}: {' '.join(module)}", flush=True)
    return subprocess.run([sys.executable, "-m", *module], check=False).returncode


def failures() -> list[str]:
    try:
        return sorted(json.loads(LAST_FAILED.read_text()))
    except (OSError, ValueError):
        return []


def tests(name: str, arguments: list[str]) -> int:
    LAST_FAILED.unlink(missing_ok=True)
    code = run(name, ["pytest", *arguments])
    failed = failures()
    if code != 1 or not 0 < len(failed) <= MOST or not all(test.startswith(SECOND_TRY) for test in failed):
        return code
    code = run("once more", ["pytest", *failed])
    if code == 0:
        print("unsteady, failed once and passed alone: " + ", ".join(failed), flush=True)
    return code


def main() -> int:
    codes = [run(name, module) for name, module in CHECKS]
    phases = (("tests", sys.argv[1:]),) if sys.argv[1:] else PHASES
    codes += [tests(name, arguments) for name, arguments in phases]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
