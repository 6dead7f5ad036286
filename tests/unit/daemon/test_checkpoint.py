"""Checkpoints of a process: what follows on what, and the real helper and driver calls against a played libcuda."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_daemon.checkpoint.checkpoints import Checkpoints
from gpu_daemon.checkpoint.driver import STATES, State
from gpu_daemon.checkpoint.process import Aim, Process
from tests.fakes import cuda

AIMS: tuple[Aim, ...] = ("parked", "running", "ended")
ALLOWED = {"lock": "running", "checkpoint": "locked", "restore": "checkpointed", "unlock": "locked"}


@given(aim=st.sampled_from(AIMS), state=st.sampled_from(STATES), refusals=st.lists(st.booleans(), max_size=6))
def test_no_process_stays_locked_and_no_failed_restore_is_tried_again(
    aim: Aim, state: State, refusals: list[bool]
) -> None:
    process, asked = Process(aim, state), list[str]()
    while (step := process.step) is not None:
        assert ALLOWED[step] == process.state, "the driver would answer ILLEGAL_STATE"
        refused = bool(refusals) and refusals.pop()
        assert not (step == "restore" and "restore" in asked), "a restore was tried twice"
        asked.append(step)
        before = process.state
        process.answered("refused" if refused else "")
        assert not refused or process.state == "failed" or process.state == before
        assert len(asked) < 5
    assert process.state != "locked"
    if not process.error:
        assert process.state == {"parked": "checkpointed", "running": "running"}.get(aim, process.state)


# -- the driver -------------------------------------------------------------------------------------------------------

GPUS = ["GPU-00000000-0000-0000-0000-0000000000aa", "GPU-00000000-0000-0000-0000-0000000000bb"]
SWAP = [(GPUS[0], GPUS[1]), (GPUS[1], GPUS[0])]


@pytest.fixture
def pid() -> Iterator[int]:
    """A process that the driver may be asked about."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
async def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Checkpoints]]:
    """Makes what asks a played driver, by a helper of its own. `fail`: a call and how it is refused."""
    made: list[Checkpoints] = []

    def make(fail: str = "", old: bool = False, step_within: float = 20.0) -> Checkpoints:
        monkeypatch.setenv("LD_LIBRARY_PATH", cuda.built(old).name)
        monkeypatch.setenv("FAKE_CUDA_CHECKPOINTS", str(tmp_path))
        monkeypatch.setenv("FAKE_CUDA_GPUS", ",".join(gpu.removeprefix("GPU-") for gpu in GPUS))
        refuse(tmp_path, fail)
        made.append(Checkpoints(step_within=step_within))
        return made[-1]

    yield make
    for one in made:
        await one.close()


def refuse(folder: Path, fail: str) -> None:
    (folder / "fail").write_text(fail)


def state(folder: Path, pid: int) -> list[str]:
    """The state (a number), and the pairs of the latest restore."""
    return (folder / str(pid)).read_text().split("\n")[:-1]


async def test_a_process_goes_to_host_memory_and_comes_back(
    driver: Callable[..., Checkpoints], pid: int, tmp_path: Path
) -> None:
    checkpoints = driver()
    assert await checkpoints.open() == ""
    assert checkpoints.remaps
    parked = await checkpoints.bring(pid, "parked")
    assert (parked.state, parked.error, state(tmp_path, pid)) == ("checkpointed", "", ["2"])
    back = await checkpoints.bring(pid, "running")
    assert (back.state, back.error, state(tmp_path, pid)) == ("running", "", ["0"])


async def test_it_comes_back_on_another_gpu_by_a_map_that_names_every_one(
    driver: Callable[..., Checkpoints], pid: int, tmp_path: Path
) -> None:
    checkpoints = driver()
    await checkpoints.bring(pid, "parked")
    written: list[str] = []

    async def watch() -> None:
        while len(written) < 2:
            written[:] = state(tmp_path, pid)[1:] or written
            await asyncio.sleep(0)

    refuse(tmp_path, "cuCheckpointProcessUnlock:999")  # so that the map stays to be read
    back = await checkpoints.bring(pid, "running", SWAP)
    assert state(tmp_path, pid) == ["1", f"{'0' * 30}aa {'0' * 30}bb", f"{'0' * 30}bb {'0' * 30}aa"]
    assert back.state == "failed"


async def test_a_map_that_leaves_a_gpu_out_is_the_end_of_the_process(
    driver: Callable[..., Checkpoints], pid: int, tmp_path: Path
) -> None:
    checkpoints = driver()
    await checkpoints.bring(pid, "parked")
    back = await checkpoints.bring(pid, "running", SWAP[:1])
    assert back.state == "failed"
    assert "CUDA_ERROR_INVALID_VALUE" in back.error


async def test_a_checkpoint_that_is_refused_leaves_the_process_running(
    driver: Callable[..., Checkpoints], pid: int, tmp_path: Path
) -> None:
    parked = await driver("cuCheckpointProcessCheckpoint:801").bring(pid, "parked")
    assert (parked.state, state(tmp_path, pid)) == ("running", ["0"])
    assert "managed memory, MIG" in parked.error


async def test_a_restore_without_room_is_stuck_for_good(
    driver: Callable[..., Checkpoints], pid: int, tmp_path: Path
) -> None:
    checkpoints = driver()
    await checkpoints.bring(pid, "parked")
    refuse(tmp_path, "cuCheckpointProcessRestore:2")
    back = await checkpoints.bring(pid, "running")
    assert back.state == "failed"
    assert "CUDA_ERROR_OUT_OF_MEMORY (the device has no memory left for it)" in back.error
    refuse(tmp_path, "")
    assert (await checkpoints.bring(pid, "running")).state == "failed", "and stays so"


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("cuCheckpointProcessGetState:800", "CAP_SYS_PTRACE"),
        ("cuCheckpointProcessLock:805", "MPS daemon does not answer"),
        ("cuCheckpointProcessLock:600", "did not come to rest in time"),
    ],
)
async def test_what_is_refused_at_once_changes_nothing_and_is_said(
    driver: Callable[..., Checkpoints], pid: int, tmp_path: Path, fail: str, words: str
) -> None:
    parked = await driver(fail).bring(pid, "parked")
    assert parked.state == "running"
    assert words in parked.error
    assert not (tmp_path / str(pid)).exists()


async def test_a_lost_device_ends_in_failure(driver: Callable[..., Checkpoints], pid: int, tmp_path: Path) -> None:
    checkpoints = driver()
    await checkpoints.bring(pid, "parked")
    refuse(tmp_path, "cuCheckpointProcessRestore:999")
    assert "does not answer any more" in (await checkpoints.bring(pid, "running")).error


async def test_an_old_driver_is_named_with_what_it_takes(driver: Callable[..., Checkpoints]) -> None:
    why = await driver(old=True).open()
    assert "has no cuCheckpointProcessGetState" in why
    assert "driver 570 (CUDA 12.8) or newer" in why


async def test_a_driver_that_hangs_costs_one_process_and_the_next_has_a_new_helper(
    driver: Callable[..., Checkpoints], pid: int, tmp_path: Path
) -> None:
    checkpoints = driver("cuCheckpointProcessCheckpoint:12345", step_within=1.0)
    hung = await checkpoints.bring(pid, "parked")
    assert hung.state == "failed"
    assert "the driver did not checkpoint it within 1 s" in hung.error
    refuse(tmp_path, "")
    (tmp_path / str(pid)).unlink()
    assert (await checkpoints.bring(pid, "parked")).state == "checkpointed"


async def test_a_helper_that_was_killed_is_replaced_and_the_state_looked_at_again(
    driver: Callable[..., Checkpoints], pid: int
) -> None:
    checkpoints = driver()
    await checkpoints.open()
    helper = checkpoints._helper
    assert helper is not None
    os.kill(helper.pid, 9)
    assert (await checkpoints.bring(pid, "parked")).state == "checkpointed"
