"""The watchdog: warned, interrupted, restarted, in this order and with time between, and never without an offence."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traitlets import TraitError

from gpu_daemon.docker_runtime import ContainerHandle
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.lineage import Kin, kin
from gpu_daemon.watchdog.config import Watchdog as Options
from gpu_daemon.watchdog.policy import GIB, STAGES, Policy, Sample, Watchdog
from gpu_daemon.watchdog.usage import NVMLUsage, Use
from gpu_daemon.watchdog.watching import GPUWatch

ADA, BOB = ReplicaId("ada", 0), ReplicaId("bob", 1)
POLICY = Policy(grace=10, patience=30)


def sample(memory: int = 0, busy: int = 0, budget: int | None = None, who: ReplicaId = ADA) -> Sample:
    return Sample(who, "GPU-a", memory, busy, budget)


def stages(watchdog: Watchdog, seen: Sample, until: float, every: float = 2.0, start: float = 0.0) -> dict[str, float]:
    """When each stage was reached while `seen` is all there is to see."""
    found: dict[str, float] = {}
    now = start
    while now <= until:
        for act in watchdog.decide([seen], now):
            assert act.stage not in found
            found[act.stage] = now
        now += every
    return found


def test_who_computes_without_a_grant_is_warned_interrupted_and_restarted() -> None:
    assert stages(Watchdog(POLICY), sample(busy=50), 300) == {"warn": 10, "interrupt": 40, "restart": 70}


def test_who_uses_more_than_was_granted_too() -> None:
    over = sample(memory=22 * GIB, budget=20 * GIB)
    assert list(stages(Watchdog(POLICY), over, 300)) == ["warn", "interrupt", "restart"]
    within = sample(memory=21 * GIB, budget=20 * GIB)  # CUDA's context and what libraries keep
    assert stages(Watchdog(POLICY), within, 300) == {}


def test_what_a_cell_left_on_the_device_is_no_offence() -> None:
    watchdog = Watchdog(POLICY)
    assert stages(watchdog, sample(memory=20 * GIB, busy=90, budget=20 * GIB), 20) == {}
    assert stages(watchdog, sample(memory=20 * GIB), 300, start=22) == {}
    assert "warn" in stages(watchdog, sample(memory=22 * GIB), 600, start=302)


def test_a_new_process_has_no_grant_of_before() -> None:
    watchdog = Watchdog(POLICY)
    watchdog.decide([sample(budget=20 * GIB)], 0)
    watchdog.died(ADA)
    assert "warn" in stages(watchdog, sample(memory=20 * GIB), 60, start=2)


def test_the_end_of_a_grant_is_no_offence() -> None:
    """NVML's samples are averages over a moment in which the grant stood."""
    watchdog = Watchdog(POLICY)
    watchdog.decide([sample(busy=90, budget=GIB)], 0)
    assert stages(watchdog, sample(busy=60), 8, start=2) == {}
    assert stages(watchdog, sample(busy=0), 30, start=10) == {}
    assert stages(watchdog, sample(busy=60), 38, start=32) == {}


def test_a_policy_that_only_warns_threatens_with_nothing() -> None:
    watchdog = Watchdog(replace(POLICY, without_grant="warn"))
    acts = [act for now in range(0, 200, 2) for act in watchdog.decide([sample(busy=9)], now)]
    assert [(act.stage, act.replica) for act in acts] == [("warn", ADA)]
    assert "without holding a grant" in acts[0].text
    assert "If it goes on" not in acts[0].text
    assert stages(Watchdog(replace(POLICY, without_grant="ignore")), sample(busy=9), 200) == {}


def test_each_text_says_what_comes_next_and_the_way_out() -> None:
    watchdog = Watchdog(POLICY)
    over = sample(memory=30 * GIB, budget=20 * GIB)
    warn, interrupt, restart = (act for now in range(0, 200, 2) for act in watchdog.decide([over], now))
    assert "uses 30.0 GiB of GPU GPU-a's memory, its budget is 20.0 GiB" in warn.text
    assert "If it goes on, it is interrupted in 30 s" in warn.text
    assert "mem=N" in warn.text.replace("SIZE", "N")
    assert "The cell is interrupted. If it goes on, it is restarted" in interrupt.text
    assert "from the state before this cell" in restart.text
    assert "If it goes on" not in restart.text


def test_what_nvml_does_not_tell_stands_still() -> None:
    watchdog = Watchdog(POLICY)
    assert list(stages(watchdog, sample(busy=50), 10)) == ["warn"]
    assert stages(watchdog, sample(busy=-1, memory=-1), 1000, start=12) == {}
    for now in range(1002, 2000, 2):
        watchdog.blind(now)
    assert list(stages(watchdog, sample(busy=50), 2020, start=2000)) == []  # 30 s were not over when it went blind
    assert list(stages(watchdog, sample(busy=50), 2030, start=2022)) == ["interrupt"]


STEP = st.tuples(
    st.floats(0.5, 25),
    st.lists(
        st.builds(
            sample,
            st.sampled_from([0, 3 * GIB, 8 * GIB]),
            st.sampled_from([0, 50]),
            st.sampled_from([None, 0, 4 * GIB]),
            st.sampled_from([ADA, BOB]),
        ),
        max_size=2,
        unique_by=lambda s: s.replica,
    ),
)
POLICIES = st.builds(
    Policy, st.sampled_from(STAGES), st.sampled_from(STAGES), st.sampled_from([2.0, 10.0]), st.sampled_from([5.0, 30.0])
)


@dataclass
class Offence:
    """What the samples alone say of one kind of offence of one replica: since when it lasts, when it was seen last."""

    since: float
    seen: float
    stages: list[tuple[str, float]] = field(default_factory=list)


@settings(max_examples=400)
@given(POLICIES, st.lists(STEP, max_size=60))
def test_stages_come_in_order_with_time_between_and_only_for_offences(policy: Policy, steps: list[Any]) -> None:
    watchdog, now = Watchdog(policy), 0.0
    offences: dict[tuple[ReplicaId, str], Offence] = {}
    last: dict[ReplicaId, int] = {}
    for pause, samples in steps:
        now += pause
        for s in samples:
            if s.budget is not None:
                last[s.replica] = s.budget
            guilty = {
                "without_grant": s.budget is None and s.busy > 0,
                "over_budget": s.memory > last.get(s.replica, 0) + policy.slack,
            }
            for kind in [kind for kind, is_so in guilty.items() if is_so]:
                known = offences.get((s.replica, kind))
                if known is None or now - known.seen >= policy.grace:
                    offences[s.replica, kind] = Offence(now, now)
                else:
                    known.seen = now
        for act in watchdog.decide(samples, now):
            kind = "without_grant" if "without holding" in act.text else "over_budget"
            offence = offences[act.replica, kind]
            assert offence.seen == now
            assert STAGES.index(act.stage) == len(offence.stages) + 1 <= policy.limit(kind)  # type: ignore[arg-type]
            if offence.stages:
                assert now - offence.stages[-1][1] >= policy.patience
            else:
                assert now - offence.since >= policy.grace
            offence.stages.append((act.stage, now))


@given(POLICIES, st.sampled_from([0.5, 1.0, 1.9]))
def test_an_offence_that_goes_on_ends_at_the_policys_limit_in_time(policy: Policy, every: float) -> None:
    bound = policy.grace + 2 * policy.patience + 4 * every
    found = stages(Watchdog(policy), sample(busy=50), bound, every)
    assert list(found) == list(STAGES[1 : policy.limit("without_grant") + 1])


# -- whose a process is -----------------------------------------------------------------------------------------------


def test_what_a_replica_started_is_its_own_also_when_its_parent_is_gone() -> None:
    """A shell in a session of its own starts a process, tells its pid and ends: the process is given to init."""
    program = (
        "import subprocess,sys; print(subprocess.Popen(['sleep','60'], stdout=subprocess.DEVNULL).pid, flush=True)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    try:
        parent.wait(10)
        parent.stdout.close()
        assert parent.pid in kin(orphan).family
        assert os.getpid() not in kin(orphan).family
        assert {os.getpid(), os.getppid()} <= kin(os.getpid()).family
    finally:
        os.kill(orphan, 9)
    assert kin(2**22 + 1) == Kin(2**22 + 1, frozenset(), "")


def test_a_container_holds_what_runs_in_its_control_group() -> None:
    handle = ContainerHandle(None, "c0ffee" * 10, Path(), "image")  # type: ignore[arg-type]
    handle.pid = 100
    assert handle.holds(Kin(7, frozenset({7}), f"0::/system.slice/docker-{'c0ffee' * 10}.scope\n"))
    assert handle.holds(Kin(8, frozenset({8, 100}), ""))
    assert not handle.holds(Kin(9, frozenset({9}), "0::/user.slice\n"))


# -- reading and carrying out -----------------------------------------------------------------------------------------


class PlayedNVML:
    """pynvml's calls that are used, with its own errors and constants."""

    NVMLError, NVML_ERROR_NOT_FOUND = pynvml.NVMLError, pynvml.NVML_ERROR_NOT_FOUND
    NVML_SUCCESS = pynvml.NVML_SUCCESS

    def __init__(self) -> None:
        self.compute: list[Any] = []
        self.mps: Any = []
        self.samples: Any = []
        self.lost = False

    def nvmlInit(self) -> None:
        if self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: str) -> Any:
        return self._answer(self.compute)

    def nvmlDeviceGetMPSComputeRunningProcesses_v3(self, handle: str) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)  # a driver of 2021

    def nvmlDeviceGetMPSComputeRunningProcesses_v2(self, handle: str) -> Any:
        return self._answer(self.mps)

    nvmlDeviceGetComputeRunningProcesses_v2 = nvmlDeviceGetComputeRunningProcesses_v3

    def nvmlDeviceGetProcessUtilization(self, handle: str, since: int) -> Any:
        found = [s for s in self._answer(self.samples) if s.timeStamp > since]
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_SUCCESS)  # as nvidia-ml-py does
        return found

    def _answer(self, value: Any) -> Any:
        if isinstance(value, int):
            raise pynvml.NVMLError(value)
        return value


def process(pid: int, memory: int | None) -> Any:
    return types.SimpleNamespace(pid=pid, usedGpuMemory=memory)


def utilisation(pid: int, busy: int, at: int) -> Any:
    return types.SimpleNamespace(pid=pid, smUtil=busy, timeStamp=at)


def test_processes_of_both_lists_with_their_newest_samples() -> None:
    nvml = PlayedNVML()
    reader = NVMLUsage(nvml, ["GPU-a"])
    nvml.compute, nvml.mps = [process(5, 100), process(6, None)], [process(7, 300)]
    nvml.samples = [utilisation(5, 10, 1), utilisation(5, 70, 2)]
    assert reader.read() == [Use("GPU-a", 5, 100, 70), Use("GPU-a", 6, -1, 0), Use("GPU-a", 7, 300, 0)]
    assert [use.busy for use in reader.read() or ()] == [0, 0, 0]  # nothing new


def test_what_may_not_be_read_is_not_told_rather_than_zero() -> None:
    nvml = PlayedNVML()
    reader = NVMLUsage(nvml, ["GPU-a"])
    nvml.compute, nvml.mps = [process(5, 100)], pynvml.NVML_ERROR_NOT_SUPPORTED
    nvml.samples = pynvml.NVML_ERROR_NO_PERMISSION
    assert reader.read() == [Use("GPU-a", 5, 100, -1)]
    nvml.samples = pynvml.NVML_ERROR_NOT_FOUND
    assert reader.read() == [Use("GPU-a", 5, 100, 0)]


def test_without_nvml_nothing_is_known() -> None:
    nvml = PlayedNVML()
    nvml.lost = True
    assert NVMLUsage(nvml, ["GPU-a"]).read() is None


class Replica:
    """What the watch needs of a LocalReplica."""

    def __init__(self, id: ReplicaId, pids: set[int], budget: int | None = None) -> None:
        self.id, self.name, self.told, self.ended = id, str(id), list[dict[str, Any]](), list[str]()
        self.handle = types.SimpleNamespace(holds=lambda process: process.pid in pids)
        share = types.SimpleNamespace(uuid="GPU-a", memory=budget)
        grant = types.SimpleNamespace(shares=(share,)) if budget is not None else None
        self.held = types.SimpleNamespace(grant=grant)

    def push(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    def end(self, reason: str) -> None:
        self.ended.append(reason)


def test_an_offender_is_told_and_ended_its_neighbour_and_strangers_are_not(caplog: pytest.LogCaptureFixture) -> None:
    ada, bob = Replica(ADA, {5, 6}, budget=4 * GIB), Replica(BOB, {7}, budget=4 * GIB)
    clock = iter(range(0, 100, 2))
    site: Any = types.SimpleNamespace(replicas={ADA: ada, BOB: bob}, now=lambda: next(clock))
    watch = GPUWatch(list, POLICY, 2.0)
    # Two processes of one replica count together.
    uses = [Use("GPU-a", 5, 3 * GIB, 0), Use("GPU-a", 6, 3 * GIB, 0), Use("GPU-a", 7, 4 * GIB, 99)]
    for _ in range(50):
        watch.look(site, [*uses, Use("GPU-a", 4711, 9 * GIB, 99)])
    assert [message["stage"] for message in ada.told] == ["warn", "interrupt", "restart"]
    assert all(message["type"] == "gpu_misuse" for message in ada.told)
    assert len(ada.ended) == 1
    assert ada.ended[0].startswith("this kernel uses 6.0 GiB")
    assert (bob.told, bob.ended) == ([], [])
    assert caplog.text.count("process 4711 uses GPU GPU-a and is no replica's") == 1


def test_a_replica_that_was_restarted_begins_anew() -> None:
    ada = Replica(ADA, {5}, budget=GIB)
    clock = iter(range(0, 1000, 2))
    site: Any = types.SimpleNamespace(replicas={ADA: ada}, now=lambda: next(clock))
    watch = GPUWatch(list, POLICY, 2.0)
    for _ in range(8):
        watch.look(site, [Use("GPU-a", 5, 3 * GIB, 0)])
    ada.handle = types.SimpleNamespace(holds=lambda process: process.pid == 5)
    for _ in range(8):
        watch.look(site, [Use("GPU-a", 5, 3 * GIB, 0)])
    assert [message["stage"] for message in ada.told] == ["warn", "warn"]


async def test_a_reading_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ada, clock = Replica(ADA, {5}), iter(range(0, 10_000, 2))
    site: Any = types.SimpleNamespace(replicas={ADA: ada}, now=lambda: next(clock))
    looks = iter([[Use("GPU-a", 5, 0, 50)], RuntimeError("library mismatch")] * 100)

    def read() -> list[Use]:
        found = next(looks)
        if isinstance(found, RuntimeError):
            raise found
        return found

    watch = asyncio.create_task(GPUWatch(read, POLICY, 0.001).run(site))
    async with asyncio.timeout(10):
        while not ada.told:
            await asyncio.sleep(0.01)
    watch.cancel()
    assert "cannot be read: library mismatch" in caplog.text


def test_options_that_cannot_work_are_refused() -> None:
    assert Options(slack="2G", over_budget="warn").policy() == Policy(over_budget="warn", slack=2 * GIB)
    with pytest.raises(TraitError, match=r"Watchdog\.every .* must be less than Watchdog\.grace"):
        Options(every=20.0)
    with pytest.raises(TraitError, match=r"Watchdog\.slack"):
        Options(slack="much")
