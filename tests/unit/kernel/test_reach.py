"""Which cells ask for a GPU before they start, though they do not say that they need one."""

from __future__ import annotations

import subprocess
import types
from typing import Any

import pytest

from nbos_kernel.gpu.reach import Touched, asks_first

NAMESPACE: dict[str, Any] = {"net": object(), "df": object(), "train": object(), "unknown": object(), "sp": subprocess}
MENTIONS: dict[str, Any] = {"net": (), "df": (), "train": ("net", "range"), "sp": (), "calls": ("sp",)}


def first(code: str, on_device: frozenset[str] = frozenset({"net"}), **more: Any) -> str:
    namespace = {**NAMESPACE, **more.pop("namespace", {})}
    given = {"more": (), "modules": ("numpy", "torch"), "expressions": (), **more}
    return asks_first(code, given["expressions"], namespace, on_device, MENTIONS.get, given["more"], given["modules"])


@pytest.mark.parametrize(
    "code",
    ["import pandas as pd", "df.head()", "x = 1", "!pip install pandas", "!ls | head -3", "%pip install torch",
     "%matplotlib inline\nimport torch", "files = !ls data", "import gc; gc.collect()", "!FOO=1 wget http://x/y"],
)  # fmt: skip
def test_a_cell_that_reaches_nothing_of_a_gpu_begins_without_one(code: str) -> None:
    assert first(code) == ""


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("net(x)", "net"),
        ("train()", "net"),
        ("unknown()", "net"),
        ("globals()['ne' + 't']", "net"),
        ("exec(text)", "net"),
        ("!python train.py", "program"),
        ("!ls; torchrun x.py", "program"),
        ("!$command", "program"),
        ("%%bash\nnvidia-smi", "program"),
        ("out = !nvidia-smi", "program"),
        ("import os; os.system('x')", "program"),
        ("import subprocess", "program"),
        ("sp.run(['x'])", "program"),
        ("calls()", "program"),
    ],
)
def test_a_cell_that_may_reach_a_gpu_asks_before_it_starts(code: str, why: str) -> None:
    assert why in first(code, namespace={"calls": types.SimpleNamespace()})


def test_user_expressions_and_functions_that_libraries_hold_count_too() -> None:
    assert "net" in first("1", expressions=["net.weight"])
    assert "net" in first("1", more=["train"])


def test_what_nobody_has_looked_into_matters_only_where_something_is_on_a_device() -> None:
    assert first("unknown()", frozenset()) == ""
    assert first("exec(text)", frozenset()) == ""


def test_beside_a_library_that_calls_cuda_by_itself_every_cell_asks() -> None:
    assert "cupy" in first("1", modules={"cupy": None})


def test_a_text_that_used_a_gpu_is_remembered_and_the_oldest_forgotten() -> None:
    touched = Touched()
    touched.add("train()")
    assert "train()" in touched
    assert "train() " not in touched
    for number in range(1000):
        touched.add(str(number))
    assert "train()" not in touched
