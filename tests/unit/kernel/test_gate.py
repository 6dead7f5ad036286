"""A cell without a GPU is stopped where it first uses one, by the real torch, and pays nothing before and after."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbos_kernel.gpu import gate as gating
from nbos_kernel.gpu.gate import Gate

ROOT = Path(__file__).parents[3]

BEFORE = """
import os, sys
from nbos_kernel.gpu.gate import AGAIN, gate
asked = []
class Stop(Exception): pass
def ask(why):
    asked.append(why)
    raise Stop
def stopped(call):
    try:
        call()
    except Stop:
        return True
    except (RuntimeError, AssertionError, TypeError) as err:  # no driver here, or a torch without CUDA
        return str(err)[:20]
    return False
import torch
there = (torch.cuda._lazy_init, torch.cuda.is_available, torch.cuda.device_count)
codes = [f.__code__ for f in there]
"""


def torch(program: str) -> str:
    """What a program prints that runs with the real torch, in a process of its own."""
    pytest.importorskip("torch")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", BEFORE + program]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_whatever_starts_cuda_asks_first_and_nothing_else_does() -> None:
    program = """
gate.arm(ask, 2, True)
torch.zeros(3).sum(); torch.manual_seed(3)
can = torch.cuda._is_compiled()  # a torch without CUDA has none to offer, granted or not
print(asked, torch.cuda.is_available() == can, torch.cuda.device_count() == 2 * can, torch.cuda.is_initialized())
uses = [lambda: torch.zeros(1, device="cuda"), lambda: torch.zeros(1).cuda(), lambda: torch.zeros(1).to("cuda:0"),
        lambda: torch.tensor([1], device="cuda"), lambda: torch.nn.Linear(1, 1).cuda(), torch.cuda.current_device,
        torch.cuda.synchronize, lambda: torch.cuda.get_device_name(0),
        lambda: torch.cuda.memory_allocated() or torch.cuda.current_stream()]
print([stopped(use) for use in uses] == [True] * len(uses), set(asked))
gate.disarm()
print([f.__code__ for f in there] == codes, there[1] is torch.cuda.is_available)
print(torch.cuda.is_available(), torch.cuda.device_count(), stopped(lambda: torch.zeros(1).cuda()) not in (True, False))
"""
    assert torch(program).splitlines() == [
        "[] True True False",
        "True {'torch uses CUDA'}",
        "True True",
        "False 0 True",
    ]


def test_where_an_earlier_cell_started_cuda_a_new_tensor_asks_again() -> None:
    program = """
import ctypes
again = ctypes.PyDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_python.so"))[AGAIN]
again.argtypes, again.restype = (ctypes.c_int8, ctypes.c_bool), None
again(1, False)
torch.cuda._initialized = True  # as after a start
use = lambda: torch.zeros(1, device="cuda")
print(stopped(use))
gate.arm(ask, 1, True)
print(stopped(use), stopped(lambda: torch.zeros(1).to("cuda")), stopped(use), len(asked))
with gate.aside():
    print(stopped(use) is not True, stopped(torch.cuda.synchronize) is not True, len(asked))
print(stopped(use), len(asked))
gate.disarm()
print(stopped(use), len(asked))
"""
    before, armed, aside, again, after = torch(program).splitlines()
    assert armed == "True True True 3"
    assert aside == "True True 3", "NBOS itself is not stopped"
    assert again == "True 4"
    assert before not in ("True", "False")
    assert after == f"{before} 4"


def test_a_forked_child_is_not_stopped() -> None:
    program = """
gate.arm(ask, 1, True)
child = os.fork()
if child == 0:
    os._exit(0 if not gate.armed and [f.__code__ for f in there] == codes else 1)
print(os.waitpid(child, 0)[1], gate.armed)
"""
    assert torch(program) == "0 True\n"


def test_the_grant_is_bound_once_and_binding_it_may_use_torch() -> None:
    program = """
def granted(why):
    asked.append(why)
    print(stopped(torch.cuda.current_device))  # as binding does: no second question, torch's own answer
gate.arm(granted, 1, True)
print(stopped(lambda: torch.zeros(1).cuda()) not in (True, False), gate.armed, [f.__code__ for f in there] == codes)
stopped(lambda: torch.zeros(1).cuda())
print(len(asked))
"""
    lines = torch(program).splitlines()
    assert lines[1:] == ["True False True", "1"]
    assert lines[0] not in ("True", "False")


def test_a_library_that_calls_cuda_by_itself_asks_when_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cupy.py").write_text("there = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    asked: list[str] = []
    gate = Gate()
    gate.arm(asked.append, 1, True)
    assert importlib.import_module("cupy").there == 1
    sys.modules.pop("cupy")
    importlib.import_module("cupy")
    sys.modules.pop("cupy")
    assert len(asked) == 1
    assert "cupy" in asked[0]
    assert not gate.armed
    assert not any(isinstance(finder, gating._Finder) for finder in sys.meta_path)


def test_a_torch_that_cannot_be_told_to_ask_again_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(gating, "AGAIN", "no_such_call")
    gating._ask_again(True)
    assert "begin it with %%gpu" in caplog.text
