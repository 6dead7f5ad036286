"""Simulated work of a cell: as long as the model says under the grant, within its memory, and broken on command."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nbos_kernel import binding, simgpu

GRANTS = itertools.count()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Sleeping moves the clock and is noted; nothing waits."""
    clock, naps = [100.0], []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(simgpu, "_played", None)
    yield naps
    binding.unbind()


def hold(tpcs: int, memory: int = 10 << 30, kind: str = "simulated") -> None:
    share: dict[str, Any] = {"uuid": "SIM-1", "index": 0, "model": "m", "tpcs": list(range(tpcs)), "memory": memory}
    raw = {"grant": f"g{next(GRANTS)}", "host": "h", "n": 1, "shares": [{**share, "whole": False, "kind": kind}]}
    binding._current = binding.from_wire(raw)


@pytest.mark.parametrize(("tpcs", "seconds"), [(32, 2.5), (64, 1.5)])
def test_a_kernel_takes_what_the_model_says_on_the_granted_tpcs(slept: list[float], tpcs: int, seconds: float) -> None:
    hold(tpcs)
    assert simgpu.run(work=64, serial=0.5) == pytest.approx(seconds)
    assert sum(slept) == pytest.approx(seconds)


def test_copies_and_steps_take_their_time(slept: list[float]) -> None:
    hold(10)
    assert simgpu.copy(5_000_000_000) == pytest.approx(0.1)
    assert list(simgpu.steps(3, work=1.0)) == [0, 1, 2]
    assert sum(slept) == pytest.approx(0.4)


def test_what_the_host_does_in_between_is_not_made_up_for(slept: list[float]) -> None:
    hold(10)
    simgpu.run(work=1.0)
    time.sleep(5)
    assert simgpu.run(work=1.0) == pytest.approx(0.1)
    assert slept == pytest.approx([0.1, 5, 0.1])


def test_memory_is_the_grants_and_comes_back(slept: list[float]) -> None:
    hold(10, memory=2 << 30)
    weights = simgpu.allocate("1.5G")
    with pytest.raises(simgpu.OutOfMemory, match=r"2\.00 GiB"):
        simgpu.allocate("1G")
    weights.free()
    weights.free()
    simgpu.allocate("2G")
    hold(10, memory=2 << 30)
    simgpu.allocate("2G")


def test_a_fault_breaks_the_device_until_the_next_cell(slept: list[float]) -> None:
    hold(10)
    simgpu.fault("an illegal memory access")
    with pytest.raises(simgpu.DeviceFault, match="illegal"):
        simgpu.run(work=1.0)
    hold(10)
    simgpu.run(work=1.0)


def test_a_kernel_whose_wait_was_interrupted_runs_on_before_the_next(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(10)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            simgpu.run(work=10.0)
    assert simgpu.run(work=1.0) == pytest.approx(1.1)


def test_without_a_simulated_grant_it_says_the_way_out(slept: list[float]) -> None:
    binding.unbind()
    with pytest.raises(simgpu.NoSimulatedGrant, match="%%gpu tpcs=16"):
        simgpu.run(work=1.0)
    hold(10, kind="nvml")
    with pytest.raises(simgpu.NoSimulatedGrant, match="real GPU"):
        simgpu.run(work=1.0)
