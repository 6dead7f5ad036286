"""What a replica tells the daemon for right-sizing: a fingerprint of what a cell does, and how long it took."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch

from nbos_kernel import resources, sizing
from nbos_kernel.fingerprint import fingerprint
from nbos_kernel.pace import Pace


def function(source: str, namespace: dict[str, Any]) -> Any:
    """A function of the notebook."""
    namespace["__name__"] = "__main__"
    exec(source, namespace)
    return next(v for v in reversed(namespace.values()) if isinstance(v, types.FunctionType))


def same(one: str, other: str, **names: Any) -> bool:
    return fingerprint(one, names) == fingerprint(other, names) != ""


def test_comments_texts_spaces_and_local_names_do_not_matter() -> None:
    one = "total = 0\nfor batch in range(1000):\n    total += step(batch)\nprint('done', total)"
    other = "s = 0  # sum\nfor b in range( 1000 ):\n    s += step(b)\nprint('finished: ', s)"
    assert same(one, other, step=len)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a = f(1)", "a = g(1)"),
        ("for i in range(1000): f(i)", "for i in range(2000): f(i)"),
        ("a = x + y", "a = x @ y"),
        ("u(x)", "w(x)"),
        ("x.sum()", "x.mean()"),
        ("with f() as a: g(a)", "with g() as a: f(a)"),
        ("a = 1\nb = a", "a = 1\nb = b"),
    ],
)
def test_what_is_done_matters(one: str, other: str) -> None:
    x = np.ones((4, 4))
    assert not same(one, other, f=len, g=max, u=np.exp, w=np.sin, x=x, y=x, b=3.0)


def test_sizes_matter_and_values_do_not() -> None:
    code = "y = x @ x"
    small, other, large = (torch.full((side, side), value) for side, value in ((64, 1.0), (64, 2.0), (128, 1.0)))
    assert fingerprint(code, {"x": small}) == fingerprint(code, {"x": other})
    assert fingerprint(code, {"x": small}) != fingerprint(code, {"x": large})
    assert fingerprint(code, {"x": small}) != fingerprint(code, {"x": small.double()})
    assert fingerprint(code, {"x": np.ones((64, 64))}) != fingerprint(code, {"x": small})
    assert fingerprint("f(n)", {"n": 31}) == fingerprint("f(n)", {"n": 32}) != fingerprint("f(n)", {"n": 64})


def test_a_model_is_known_by_its_class_and_parameters() -> None:
    code = "out = model(x)"
    names: dict[str, Any] = {"x": torch.ones(8, 16), "model": torch.nn.Linear(16, 4)}
    before = fingerprint(code, names)
    assert fingerprint(code, {**names, "model": torch.nn.Linear(16, 4)}) == before
    assert fingerprint(code, {**names, "model": torch.nn.Linear(16, 400)}) != before
    assert fingerprint(code, {**names, "model": torch.nn.Linear(16, 4).eval()}) != before


def test_the_code_of_called_functions_counts_also_of_those_they_call() -> None:
    first: dict[str, Any] = {}
    function("def inner(a): return a * 2\ndef outer(a): return inner(a)", first)
    again: dict[str, Any] = {}
    function("def inner(a): return a * 2  # the same\ndef outer(a): return inner(a)", again)
    changed: dict[str, Any] = {}
    function("def inner(a): return a ** 9\ndef outer(a): return inner(a)", changed)
    code = "outer(3)"
    assert fingerprint(code, first) == fingerprint(code, again) != fingerprint(code, changed)


def test_the_second_run_of_a_cell_is_the_first_ones_though_its_results_are_there_now() -> None:
    code = "loss = f(x)\nlosses = [loss]\nfor e in range(3):\n    losses.append(loss)\n{k: v for k, v in losses}"
    names: dict[str, Any] = {"f": len, "x": np.ones(3)}
    later = {**names, "loss": 3.0, "losses": [1, 2], "e": 2, "k": np.ones(4), "v": 0}
    assert fingerprint(code, names) == fingerprint(code, later)


def test_imports_in_the_cell_are_what_they_import() -> None:
    code = "import math as m\nfrom json import dumps\nm.sin(3); dumps(4)"
    assert same(code, code.replace("m.", "mm.").replace("as m", "as mm"))
    assert not same(code, code.replace("math", "cmath"))
    assert fingerprint(code, {}) == fingerprint(code, {"m": __import__("math"), "dumps": len})


def test_magics_are_no_obstacle_and_what_is_no_python_has_no_fingerprint() -> None:
    assert same("%matplotlib inline\n!ls\nf(3)", "%time 3\n!pwd\nf(3)", f=len)
    assert fingerprint("%%bash\nfor f in *; do echo $f; done", {}) == ""
    assert fingerprint("x = " + "1 +" * 50_000 + "1", {}) == ""
    assert fingerprint("((" * 5000, {}) == ""


def test_nothing_of_the_users_is_run() -> None:
    class Trap:
        __module__ = "__main__"

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

        def __len__(self) -> int:
            raise AssertionError("its length was asked for")

    assert fingerprint("f(trap)", {"f": len, "trap": Trap()})


GPU = {"gpus": 0, "tpcs": 8, "memory": 0, "model": ""}


def test_a_cell_that_says_exact_is_not_made_smaller() -> None:
    assert sizing.key("%%gpu tpcs=8\nf()", {}, GPU, {})
    assert sizing.key("%%gpu tpcs=8\nf()", {}, GPU, {}) == sizing.key("f()", {}, GPU, {})
    assert sizing.key("%%gpu tpcs=8 exact\nf()", {}, GPU, {}) == ""
    assert sizing.key("f()", {"nbos": {"exact": True}}, GPU, {}) == ""
    assert sizing.key("f()", {}, {**GPU, "tpcs": 0}, {}) == ""
    assert resources.of_cell("%%gpu tpcs=8 exact\n1", {}, {}) == GPU


def test_a_notebook_may_switch_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_on", True)
    assert "is off" in str(sizing.switch(["off"]))
    assert sizing.key("f()", {}, GPU, {}) == ""
    assert "is off" in str(sizing.switch([]))
    assert "is on" in str(sizing.switch(["on"]))
    assert sizing.switch(["maybe"]) is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_without_steps_the_cell_is_measured_when_it_went_well(clock: list[float]) -> None:
    pace = Pace()
    pace.begin()
    clock[0] += 2
    pace.end()
    clock[0] += 5
    assert pace.took(True) == {"seconds": 2.0, "unit": "cell", "whole": 2.0}
    assert pace.took(True) is None, "once"
    pace.begin()
    clock[0] += 2
    assert pace.took(False) is None


def test_steps_are_measured_though_most_do_not_wait_for_the_device_and_a_pause_comes_between(
    clock: list[float],
) -> None:
    pace = Pace()
    pace.begin()
    for number in range(400):
        clock[0] += 3.0 if number == 0 else 0.01 if number % 10 else 0.11
        if number == 200:
            clock[0] += 60
        pace.step()
    took = pace.took(False)
    assert took is not None
    assert took["unit"] == "step"
    assert took["seconds"] == pytest.approx(0.02, rel=0.1)
    assert took["whole"] > 60


def test_a_million_steps_are_remembered_in_little_memory(clock: list[float]) -> None:
    pace = Pace()
    pace.begin()
    for _ in range(100_000):
        clock[0] += 0.001
        pace.step()
    assert len(pace._stamps) <= 4096
    took = pace.took(True)
    assert took is not None
    assert took["seconds"] == pytest.approx(0.001, rel=0.01)


def test_steps_of_a_torch_optimizer_are_counted() -> None:
    model = torch.nn.Linear(2, 2)
    pace, optimizer = Pace(), torch.optim.SGD(model.parameters())
    pace.begin()
    for _ in range(20):
        optimizer.step()
    took = pace.took(True)
    assert took is not None
    assert took["unit"] == "step"
    assert 0 < took["seconds"] <= took["whole"]
