"""Drivers that are played at the C boundary: shared objects that answer like NVIDIA's, compiled for a test from the
sources in this folder. The Python bindings above them are the real ones.

A library is loaded by the process that is started with `environment(folder)`, never by the tests' own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def build(folder: Path, source: str, library: str, *defines: str) -> Path:
    """Compile `source` (a C file here) into `folder` under the name that programs load, such as `libcuda.so.1`.

    defines: what the preprocessor is told, such as `OLD_DRIVER`. Returns `folder`. Raises RuntimeError with the
    compiler's words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CC", "gcc"), "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    command += [f"-Wl,-soname,{library}", *(f"-D{name}" for name in defines)]
    command += ["-o", str(folder / library), str(HERE / source), "-lpthread"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as err:
        raise RuntimeError(f"the drivers that tests play are compiled with {command[0]}: install gcc") from err
    if done.returncode:
        raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
    return folder


def environment(*folders: Path, **more: str) -> dict[str, str]:
    """The environment of a process that finds the libraries in `folders` before any other."""
    paths = [*map(str, folders), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(paths), **more}
