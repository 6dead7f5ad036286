"""`python -m tests`: lint, format, types, then every test; the exit code is the first failure's.

Arguments are passed on to pytest (`python -m tests tests/unit`).
"""

from __future__ import annotations

import subprocess
import sys

CHECKS = (
    ("lint", ["ruff", "check", "."]),
    ("format", ["ruff", "format", "--check", "."]),
    ("types", ["mypy"]),
)


def run(name: str, module: list[str]) -> int:
    print(f"== {name}: {' '.join(module)}", flush=True)
    return subprocess.run([sys.executable, "-m", *module], check=False).returncode


def main() -> int:
    codes = [run(name, module) for name, module in CHECKS]
    codes.append(run("tests", ["pytest", *sys.argv[1:]]))
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
