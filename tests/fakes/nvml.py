"""The played libnvidia-ml of one test: its scenario, and processes that run above it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.fakes import build, environment

ROOT = Path(__file__).parents[2]

H200 = {
    "name": "NVIDIA_H200",
    "memory": 150_754_820_096,
    "used": 1 << 30,
    "cc": "9.0",
    "temperature": 41,
    "slowdown": 90,
    "power": 310_400,
    "limit": 700_000,
    "utilisation": 87,
    "ecc": 0,
    "rows": "0,0,0,0",
    "reasons": 0,
    "recovery": 0,
}
"""A GPU that is well and tells all that a data-centre chip tells."""


def gpu(index: int = 0, **changes: Any) -> str:
    """The scenario's line of an H200; a value of None: it does not tell that."""
    return _line("gpu", {"uuid": f"GPU-{index}", **H200, **changes})


def mig(number: int = 0, **changes: Any) -> str:
    """The line of a MIG instance of the GPU in the line above."""
    instance = {
        "name": "NVIDIA_H200_MIG_1g.18gb",
        "memory": 18 << 30,
        "cc": "9.0",
        "sms": 16,
        "gi": 7 + number,
        "ci": 0,
    }
    return _line("mig", {"uuid": f"MIG-{number}", **instance, **changes})


def _line(kind: str, values: dict[str, Any]) -> str:
    return " ".join([kind, *(f"{name}={value}" for name, value in values.items() if value is not None)])


class PlayedNVML:
    """The library is compiled into `folder`; processes with `environment` load it."""

    def __init__(self, folder: Path, *lines: str, old: bool = False) -> None:
        self.library = build(folder / "driver", "nvml.c", "libnvidia-ml.so.1", *(["OLD_DRIVER"] if old else []))
        self.file = folder / "scenario"
        self.lines: list[str] = []
        self.play(*lines)

    def play(self, *lines: str) -> None:
        """From now on the machine is like this. Whole or not at all: it is read while it is written."""
        self.lines = list(lines)
        new = self.file.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        os.replace(new, self.file)

    def add(self, line: str) -> None:
        self.play(*self.lines, line)

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.library, NBOS_FAKE_NVML=str(self.file), PYTHONPATH=str(ROOT))

    def python(self, code: str, seconds: float = 30.0, **more: str) -> Any:
        """What a program prints (as JSON) that runs above the played driver; `more` stands in its environment."""
        command, environ = [sys.executable, "-c", code], {**self.environment, **more}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
