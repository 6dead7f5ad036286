"""The sides that `state.py` compares: a kernel of NBOS with its stages, and plain kernels that save all they hold.

A rival is a plain ipykernel whose own hook saves the namespace after each cell, before the reply, as a user would
have it: cloudpickle or dill of everything into one file that is synced, or Kishu with its own hooks and database.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from direct import changed_environment, direct_nbos, is_idle
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from measure import ROOT, Running, nbos_hub

STAGES = 60.0
"""Seconds until an entry that never reaches its standbys is an error."""
EMPTY_NOTEBOOK = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'


class TooSlow(RuntimeError):
    """A cell had no reply in the time it was given."""


def run(client: BlockingKernelClient, code: str, timeout: float = 120.0) -> float:
    """Seconds from the request to the reply of a cell that must succeed; iopub is read to its idle."""
    began = time.perf_counter()
    msg_id = client.execute(code)
    reply = _reply(client, msg_id, timeout)
    took = time.perf_counter() - began
    while True:
        message = client.get_iopub_msg(timeout=timeout)
        if message["parent_header"].get("msg_id") == msg_id and is_idle(message):
            break
    if reply["status"] != "ok":
        raise RuntimeError(f"{code[:60]!r}: {reply.get('ename')}: {reply.get('evalue')}")
    return took


def _reply(client: BlockingKernelClient, msg_id: str, timeout: float) -> dict[str, str]:
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(Exception):  # queue.Empty, from a module that is not public
            message = client.get_shell_msg(timeout=left)
            if message["parent_header"].get("msg_id") == msg_id:
                return dict(message["content"])
    raise TooSlow(f"no reply within {timeout:g} s")


# -- NBOS -------------------------------------------------------------------------------------------------------------


@dataclass
class Stages:
    """The stages of one execution: seconds after its code ended."""

    captured: float = 0.0
    committed: float = 0.0
    standby: float = 0.0
    fresh: int = 0


class Stamps:
    """What the replicas' tap writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._last = -1

    def forget(self) -> None:
        """Another kernel begins, with numbers of its own."""
        self._at, self._last = self.path.stat().st_size if self.path.exists() else 0, -1

    def next(self, replicas: int = 3) -> Stages:
        """The stages of the next execution, once its last standby has it."""
        deadline = time.monotonic() + STAGES
        while True:
            found = self._read(replicas)
            if found is not None:
                return found
            if time.monotonic() > deadline:
                raise TimeoutError(f"the last execution did not reach {replicas} replicas: {self.path.read_text()}")
            time.sleep(0.02)

    def _read(self, replicas: int) -> Stages | None:
        if not self.path.exists():
            return None
        lines = [line.split() for line in self.path.read_bytes()[self._at :].decode().splitlines()]
        ended = [(int(n), float(at)) for n, stage, _, at, _ in lines if stage == "ended"]
        if not ended or ended[-1][0] <= self._last:
            return None
        n, end = ended[-1]
        mine = [(stage, float(at), int(size)) for number, stage, _, at, size in lines if int(number) == n]
        times = {stage: at - end for stage, at, _ in mine}
        applied = [at - end for stage, at, _ in mine if stage == "applied"]
        if len(applied) < replicas - 1 or "committed" not in times:
            return None
        self._last = n
        fresh = next(size for stage, _, size in mine if stage == "captured")
        return Stages(times["captured"], times["committed"], max(applied), fresh)


@dataclass
class Ours:
    hub: Running
    stamps: Stamps

    @contextlib.contextmanager
    def kernel(self) -> Iterator[BlockingKernelClient]:
        self.stamps.forget()
        with direct_nbos(self.hub) as client:
            yield client

    def stored(self) -> int:
        """Bytes in the blob store."""
        root = self.hub.directory / "blobs"
        return sum(file.stat().st_size for file in root.rglob("*") if file.is_file())


@contextlib.contextmanager
def ours(scratch: Path) -> Iterator[Ours]:
    """`nbos up`, whose replicas leave stamps."""
    stamps = Stamps(scratch / "stamps")
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks" / "tap"), before]))
    with changed_environment({"PYTHONPATH": path, "PYTHON_NBOS_STAMPS": str(stamps.path)}), nbos_hub() as hub:
        yield Ours(hub, stamps)


# -- the others -------------------------------------------------------------------------------------------------------

PICKLE_ALL = """
def _install(module, path):
    import importlib, os
    saver, shell = importlib.import_module(module), get_ipython()
    mine = set(shell.user_ns)
    def save(result):
        names = {k: v for k, v in shell.user_ns.items() if k not in mine and not k.startswith("_")}
        with open(path, "wb") as file:
            saver.dump(names, file, protocol=5)
            file.flush()
            os.fsync(file.fileno())
    shell.events.register("post_run_cell", save)
"""

KISHU = """
import site
for folder in {folders!r}: site.addsitedir(folder)
from kishu.jupyterint import init_kishu
init_kishu({notebook!r})
"""


@dataclass
class Rival:
    name: str
    client: BlockingKernelClient
    saved: Path

    def size(self) -> int:
        return sum(file.stat().st_size for file in self.saved.parent.iterdir() if file.name.startswith("saved"))


@contextlib.contextmanager
def plain() -> Iterator[BlockingKernelClient]:
    with _kernel(sys.executable, {}) as client:
        yield client


@contextlib.contextmanager
def rival(name: str, scratch: Path, kishu: Path | None) -> Iterator[Rival]:
    """name: cloudpickle, dill, or Kishu; kishu: the Python that has that one."""
    folder = scratch / name
    folder.mkdir(exist_ok=True)
    saved = folder / ("saved.ipynb" if name == "Kishu" else "saved")
    env = {}
    if name == "Kishu":  # as its own tests run it: without a Jupyter frontend that it could ask to save the notebook
        env = {"ENV_KISHU_TEST_MODE": "true", "TEST_NOTEBOOK_PATH": str(saved), "KISHU_PATH_ROOT": str(folder)}
    python = str(kishu) if name == "Kishu" else sys.executable
    with _kernel(python, env) as client:
        if name == "Kishu":
            saved.write_text(EMPTY_NOTEBOOK)
            folders = [entry for entry in sys.path if entry.endswith("site-packages")]
            run(client, KISHU.format(folders=folders, notebook=str(saved)))
        else:
            run(client, PICKLE_ALL + f"_install({name!r}, {str(saved)!r})")
        yield Rival(name, client, saved)
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()


@contextlib.contextmanager
def _kernel(python: str, env: dict[str, str]) -> Iterator[BlockingKernelClient]:
    manager = KernelManager()
    spec = manager.kernel_spec
    assert spec is not None
    spec.argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager.start_kernel(env={**os.environ, **env})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
