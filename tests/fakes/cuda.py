"""Builds the played CUDA driver (`cuda.c`) and runs code against it.

In a process of its own: a library once loaded stays. The real ctypes calls run, over the real C boundary.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda.c")
COMPILE = ("gcc", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror")
PROJECT = Path(__file__).parents[2]


@functools.cache
def built(old: bool = False) -> tempfile.TemporaryDirectory[str]:
    """A folder with a `libcuda.so.1`."""
    folder = tempfile.TemporaryDirectory(prefix="nbos-fake-cuda-")
    options = ["-DOLD", "-Wno-unused"] if old else []
    subprocess.run([*COMPILE, "-shared", *options, "-o", f"{folder.name}/libcuda.so.1", str(SOURCE)], check=True)
    return folder


def headers() -> str:
    """The folder with NVIDIA's own cuda.h, '' where there is none."""
    folder = os.environ.get("CUDA_INCLUDE", "/usr/local/cuda/include")
    return folder if Path(folder, "cuda.h").is_file() else ""


def check() -> None:
    """Have the compiler compare every declaration here with those of cuda.h."""
    options = ["-DCHECK_CUDA_H", "-include", "stddef.h", f"-I{headers()}", "-fsyntax-only"]
    subprocess.run([*COMPILE, *options, str(SOURCE)], check=True)


def run(program: str, old: bool = False, **environment: str) -> str:
    """What a Python program printed that ran with the played driver."""
    environ = {**os.environ, "LD_LIBRARY_PATH": built(old).name, "PYTHONPATH": str(PROJECT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    return done.stdout
