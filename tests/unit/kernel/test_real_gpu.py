"""benchmarks/real_gpu.py without a GPU: it refuses politely, its figures are right, and what fails is a row."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import gpu_figures  # noqa: E402
import gpu_stealing  # noqa: E402
import real_gpu  # noqa: E402

from tests.fakes import cuda  # noqa: E402


def test_without_a_gpu_it_says_why_and_ends_with_2() -> None:
    command = [sys.executable, str(FOLDER / "real_gpu.py")]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is none to use here: " in done.stderr
    assert done.stdout == ""


@given(st.floats(1e-6, 10), st.floats(0, 1), st.sets(st.integers(1, 66), min_size=2, max_size=6))
def test_the_fit_finds_the_law_that_made_the_samples(m: float, b: float, sizes: set[int]) -> None:
    fitted = gpu_figures.fit({t: m / t + b for t in sizes})
    for t in sizes:
        assert fitted.at(t) == pytest.approx(m / t + b, rel=1e-3)
    assert fitted.error < 1e-3


def test_a_poor_fit_says_so_and_nothing_is_negative() -> None:
    grows = gpu_figures.fit({1: 1.0, 66: 2.0})
    assert (grows.m, grows.error > 0.2) == (0.0, True)
    steep = gpu_figures.fit({1: 1.0, 2: 0.1})
    assert (steep.b, steep.error > 0.2) == (0.0, True)
    with pytest.raises(ValueError, match="two slices"):
        gpu_figures.fit({4: 1.0})


def test_the_smallest_slice_within_the_slip() -> None:
    assert gpu_figures.smallest(gpu_figures.Fit(0.0, 1.0, 0), 66, 1.04) == 1
    assert gpu_figures.smallest(gpu_figures.Fit(1.0, 0.0, 0), 66, 1.04) == 64
    fitted = gpu_figures.Fit(1.0, 0.1, 0)
    least = gpu_figures.smallest(fitted, 66, 1.04)
    assert fitted.at(least) <= 1.04 * fitted.at(66) < fitted.at(least - 1)


def test_shared_and_surplus_sms_are_named() -> None:
    assert gpu_figures.confinement({"A": [0, 1], "B": [2, 3]}, {"A": 2, "B": 2}) == []
    wrong = gpu_figures.confinement({"A": [0, 1, 2], "B": [2, 3]}, {"A": 2, "B": 2})
    assert wrong == ["slice A: kernels saw 3 SMs, 2 were granted", "slices A and B share 1 SMs: 2"]
    assert gpu_figures.ranges([5, 0, 1, 2, 8, 9]) == "0-2, 5, 8-9"


SIDE = """
import json, sys
asked = json.loads(sys.argv[1])
if asked["do"] == "sms":
    print(json.dumps({n: [sm for t in tpcs for sm in (2 * t, 2 * t + 1)] for n, tpcs in asked["slices"].items()}))
elif asked["do"] == "sweep" and asked["work"] == "gemm":
    print(json.dumps({t: 0.066 / t + 0.001 for t in asked["sizes"]}))
elif asked["do"] == "give back":
    found = {"out": 5e10, "back": 4e10, "left": 2**21, "same": asked["gib"] == 1, "stayed": {"a graph": 8}}
    print(json.dumps(found if asked["gib"] < 40 else {"skipped": "3 GiB free"}))
elif asked["do"] == "hold" and asked["gib"] < 40:
    print(json.dumps({"bytes": asked["gib"] << 30}), flush=True)
    sys.stdin.readline()
    print(json.dumps({"same": asked["gib"] == 1}))
elif asked["do"] == "hold":
    print(json.dumps({"skipped": "3 GiB free"}))
elif asked["do"] == "burst":
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    for _ in range(20):
        print(json.dumps({"ask": True}), flush=True)
        sys.stdin.readline()
        with open(asked["log"], "a") as log:
            log.write("burst\\n")
        print(json.dumps({"over": True}), flush=True)
    print(json.dumps({"took": [0.01] * 20}))
elif asked["do"] == "borrow":
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        if "end" in told:
            print(json.dumps({"steps": 60}), flush=True)
        elif "tpcs" in told:
            with open(asked["log"], "a") as log:
                log.write(f"{len(told['tpcs'])}\\n")
            print(json.dumps({"on": True}), flush=True)
elif asked["do"] == "run":
    print(json.dumps({"late": False, "rate": 5.0, "sms": asked["tpcs"]}))
else:
    sys.exit("RuntimeError: out of memory")
"""


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes on a GPU, played."""
    played = tmp_path / "side.py"
    played.write_text(SIDE)
    monkeypatch.setattr(real_gpu, "SIDE", played)


@pytest.mark.usefixtures("side")
def test_what_the_processes_tell_becomes_rows() -> None:
    rows: list[list[str]] = []
    soon = time.monotonic() + 60
    real_gpu.attempt(rows, "confinement", lambda: real_gpu.confined(66, {}), soon)
    real_gpu.attempt(rows, "neighbours", lambda: real_gpu.neighbours(66, {}, 0.1), soon)
    real_gpu.attempt(rows, "speeds", lambda: real_gpu.speeds(66, "gemm", 0.1), soon)
    text = gpu_figures.table(rows)
    assert "44 SMs granted  " in text
    assert "disjoint, within the grant" in text
    assert "the same SMs" in text
    assert "100 % and 100 % of its speed alone  0 SMs in common" in text
    assert "33 SMs in common" in text
    assert "off by ≤ 0 %" in text


@pytest.mark.usefixtures("side")
def test_bytes_that_differ_are_not_overlooked() -> None:
    assert real_gpu.given_back(1) == [
        ["1 GiB", "50.0 GB/s out, 40.0 GB/s back", "every byte the same, 2 MiB held meanwhile; stayed: a graph"]
    ]
    assert "BYTES DIFFER" in real_gpu.given_back(10)[0][2]
    assert real_gpu.given_back(40) == [["left out", "3 GiB free", ""]]


@pytest.mark.usefixtures("side")
def test_a_burst_begins_once_the_borrower_has_left_and_it_is_lent_to_again_afterwards(tmp_path: Path) -> None:
    log = tmp_path / "log"
    rows = gpu_stealing.stealing(lambda asked: real_gpu.start({**asked, "log": str(log)}, {}), 10, 2.0)
    assert [row[0] for row in rows] == ["the important tenant alone", "quotas", "quotas + stealing"]
    assert rows[2][1:] == ["p50 10.00 ms, p99 10.00 ms (1.00 × alone)", "the other: 30.0 steps a second"]
    assert log.read_text().split() == ["burst"] * 40 + ["10", "4", "burst"] * 20 + ["10"]


@pytest.mark.usefixtures("side")
def test_a_tenant_that_ends_early_is_a_row() -> None:
    rows: list[list[str]] = []
    real_gpu.attempt(rows, "lent", lambda: real_gpu.stolen(10, {}, 0.1), time.monotonic() + 60)
    assert rows[1] == ["failed", "KeyError: 'log'", ""]


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the played driver, which the real helper asks, keeps the states of processes."""
    folder = tmp_path / "states"
    folder.mkdir()
    monkeypatch.setenv("LD_LIBRARY_PATH", cuda.built().name)
    monkeypatch.setenv("FAKE_CUDA_CHECKPOINTS", str(folder))
    return folder


@pytest.mark.usefixtures("side")
def test_a_process_is_checkpointed_restored_and_its_bytes_compared(states: Path) -> None:
    ((size, speed, same),) = real_gpu.checkpointed(1)
    assert (size, "GB/s out, " in speed, same.split(";")[0]) == ("1 GiB", True, "every byte the same")
    assert [file.read_text().split()[0] for file in states.iterdir()] == ["0"], "it runs again"
    assert "BYTES DIFFER" in real_gpu.checkpointed(10)[0][2]
    assert real_gpu.checkpointed(40) == [["left out", "3 GiB free", ""]]


@pytest.mark.usefixtures("side")
def test_a_checkpoint_that_the_driver_refuses_is_a_row(states: Path) -> None:
    (states / "fail").write_text("cuCheckpointProcessLock:800")
    rows: list[list[str]] = []
    real_gpu.attempt(rows, "checkpoint", lambda: real_gpu.checkpointed(1), time.monotonic() + 60)
    assert rows[1][0] == "failed"
    assert "cuCheckpointProcessLock" in rows[1][1]


@pytest.mark.usefixtures("side")
def test_what_fails_or_has_no_time_left_is_a_row() -> None:
    rows: list[list[str]] = []
    real_gpu.attempt(rows, "speeds", lambda: real_gpu.speeds(66, "attention", 0.1), time.monotonic() + 60)
    real_gpu.attempt(rows, "late", lambda: real_gpu.speeds(66, "gemm", 0.1), time.monotonic() - 1)
    assert rows[1] == ["failed", "RuntimeError: out of memory", ""]
    assert rows[3][:2] == ["left out", "the time is over (--minutes)"]


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = tmp_path / "side.py"
    hangs.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(real_gpu, "SIDE", hangs)
    with pytest.raises(real_gpu.Failed, match="not done within 0 s"):
        real_gpu.ask({}, within=0.2, do="describe")
