"""The examples in docs/state.md do what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nbos_kernel.capture import rebuilt

from .pair import Pair

PAGE = Path(__file__).parents[3] / "docs" / "state.md"


@pytest.fixture
def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text().partition("## Your own types")[2], re.DOTALL)
    return str(code)


def test_a_registered_type_is_replicated_as_the_page_says(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuilt, "registered", {})
    pair = Pair()
    pair.cell(example)
    assert pair.notices == []
    assert pair.on_standby("(camera.address, camera.frames, type(camera) is Camera)") == ("10.0.0.7", 0, True)
    # Both sides are one process here, whose registrations are now those of the standby's class.
    pair.cell("nbos_kernel.register_reducer(Camera, again)\ncamera.frames = 5")
    assert pair.on_standby("camera.frames") == 5
    pair.cell("nbos_kernel.register_reducer(Camera, again)\ncamera.recording = True")
    assert pair.standby.replica.lost["camera"] == "Camera: a camera that is recording; stop it first"
    pair.cell("nbos_kernel.register_reducer(Camera, again)\ncamera.recording = False")
    pair.cell("nbos_kernel.register_reducer(Camera, again)\nclass Large(Camera): pass\nother = Large('10.0.0.8')")
    assert pair.standby.replica.lost == {}
    assert pair.on_standby("camera.frames") == 5
    pair.switch()
    pair.cell("more = Camera('10.0.0.9')")
    assert pair.on_standby("more.address") == "10.0.0.9"


def test_code_that_runs_while_a_value_is_loaded_sees_the_variables_that_came_with_it() -> None:
    """And the namespace shows them no earlier than everything else."""
    pair = Pair()
    make = "class Late:\n    def __setstate__(self, state): self.__dict__.update(state, doubled=twice(state['v']))\n"
    pair.cell("before = 1")
    pair.cell(make + "def twice(v): return [v * factor]\nfactor = 2\nlate = Late(); late.v = 4; late.doubled = [8]")
    assert pair.standby.replica.lost == {}
    assert pair.on_standby("(late.v, late.doubled, before)") == (4, [8], 1)
    assert pair.on_standby("twice.__globals__") is pair.standby.ns
