"""A grant becomes CUDA_VISIBLE_DEVICES before CUDA starts, and a device of a running torch afterwards."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nbos_kernel
from nbos_kernel import binding
from nbos_kernel.gpu import budget


def grant(*uuids: str, kind: str = "nvml", memory: int = 10, whole: bool = True) -> binding.Grant | None:
    shares = [
        {"uuid": uuid, "index": i, "model": "m", "tpcs": [0, 1], "memory": memory, "whole": whole, "kind": kind}
        | {"mechanism": "mig"}
        for i, uuid in enumerate(uuids)
    ]
    return binding.from_wire({"grant": "g", "host": "h", "n": 3, "shares": shares})


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(binding.VISIBLE, "before")
    monkeypatch.setattr(binding, "_watched", None)
    monkeypatch.setattr(binding, "_said", set())
    monkeypatch.setattr(binding, "_bound", [])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)


def test_before_cuda_starts_the_environment_names_the_devices() -> None:
    assert binding.bind(grant("GPU-a", "GPU-b")) == ""
    assert os.environ[binding.VISIBLE] == "GPU-a,GPU-b"
    held = nbos_kernel.grant()
    assert held is not None
    assert (held.devices, held.tpcs, held.memory) == (("GPU-a", "GPU-b"), 4, 20)
    binding.unbind()
    assert nbos_kernel.grant() is None


def test_without_a_grant_no_device_is_visible() -> None:
    binding.bind(None)
    assert os.environ[binding.VISIBLE] == ""


def test_a_simulated_grant_shows_no_device() -> None:
    binding.bind(grant("GPU-s", kind="simulated"))
    assert os.environ[binding.VISIBLE] == ""
    binding.unbind()


def running_torch(calls: list[Any]) -> SimpleNamespace:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda i: SimpleNamespace(uuid="ab"[i], total_memory=100),
        set_device=lambda i: calls.append(("device", i)),
        synchronize=lambda i: calls.append(("synchronize", i)),
        set_per_process_memory_fraction=lambda f, i: calls.append(("fraction", f, i)),
    )
    return SimpleNamespace(cuda=cuda)


def test_a_running_torch_gets_the_device_and_the_slices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "torch", running_torch(calls))
    assert binding.bind(grant("GPU-b", memory=25, whole=False)) == ""
    assert calls == [("device", 1), ("fraction", 0.25, 1)]
    assert binding.unbind() == ""
    assert calls[2:] == [("synchronize", 1), ("fraction", 1.0, 1)]
    assert binding.unbind() == ""  # between cells nothing is bound, and a device is not waited for
    assert len(calls) == 4


def test_an_instance_of_mig_is_known_by_its_uuid_once_cuda_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "torch", running_torch(calls))
    assert binding.bind(grant("MIG-b")) == ""
    assert calls[0] == ("device", 1)
    assert "cannot see" in binding.bind(grant("MIG-c"))
    binding.unbind()


def test_a_whole_device_is_bound_to_its_budget_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "torch", running_torch(calls))
    binding.bind(grant("GPU-b", memory=80))
    assert calls == [("device", 1), ("fraction", 0.8, 1)]
    binding.unbind()


def test_a_kernel_that_fails_after_the_cells_last_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(number: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch = running_torch([])
    torch.cuda.synchronize = synchronize
    monkeypatch.setitem(sys.modules, "torch", torch)
    binding.bind(grant("GPU-b"))
    notice = binding.unbind()
    assert "illegal memory access" in notice
    assert "restart the kernel" in notice


def test_that_a_slice_is_cooperative_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", running_torch([]))
    share = {"uuid": "GPU-b", "index": 0, "tpcs": [0], "memory": 25, "whole": False, "why": "no MPS daemon runs here"}
    held = binding.from_wire({"grant": "g", "shares": [share]})
    said = binding.bind(held)
    assert "it is cooperative here: no MPS daemon runs here." in said
    assert [one.mechanism for one in binding.held()] == ["cooperative"]
    binding.unbind()
    assert binding.bind(held) == ""
    binding.unbind()


def test_a_cell_without_memory_is_told_its_budget() -> None:
    torchs = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
    error = torchs("CUDA out of memory.")
    budget.explain(error, grant("GPU-b", memory=20 << 30))
    (note,) = error.__notes__
    assert "budget is 20.0 GiB on m" in note
    assert "mem=SIZE" in note
    other = MemoryError()
    budget.explain(other, grant("GPU-b"))
    budget.explain(error, None)
    assert not hasattr(other, "__notes__")
    assert len(error.__notes__) == 1


def test_a_torch_that_starts_cuda_in_the_cell_gets_the_slices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    queued: list[Any] = []
    torch = running_torch(calls)
    torch.cuda.is_initialized = lambda: False
    torch.cuda._lazy_call = queued.append
    monkeypatch.setitem(sys.modules, "torch", torch)
    for _ in range(2):
        assert binding.bind(grant("GPU-b", memory=25, whole=False)) == ""
    assert (os.environ[binding.VISIBLE], calls, len(queued)) == ("GPU-b", [], 1)
    queued[0]()
    assert calls == [("device", 1), ("fraction", 0.25, 1)]
    binding.unbind()


TORCH = """
from types import SimpleNamespace
calls, queued = [], []
def is_initialized(): return False
def device_count(): return 1
def get_device_properties(i): return SimpleNamespace(uuid="b", total_memory=100)
def set_device(i): calls.append(("device", i))
def set_per_process_memory_fraction(f, i): calls.append(("fraction", f, i))
_lazy_call = queued.append
"""


def test_a_torch_that_the_cell_imports_gets_the_slices_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch" / "cuda").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("from . import cuda\n")
    (tmp_path / "torch" / "cuda" / "__init__.py").write_text(TORCH)
    monkeypatch.syspath_prepend(tmp_path)
    binding.bind(grant("GPU-b", memory=25, whole=False))
    cuda = importlib.import_module("torch.cuda")
    (started,) = cuda.queued
    started()
    assert cuda.calls == [("device", 0), ("fraction", 0.25, 0)]
    binding.unbind()
    for name in ("torch", "torch.cuda"):
        sys.modules.pop(name)


def test_a_device_that_torch_cannot_see_any_more_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", running_torch([]))
    assert "restart the kernel" in binding.bind(grant("GPU-z"))
    binding.unbind()
