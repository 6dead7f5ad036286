"""Slices: the groups of a split, the real driver calls against a played libcuda, torch's stream while a cell runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbos_kernel.gpu import confine
from nbos_kernel.gpu.confine import Confinement, Held
from nbos_kernel.gpu.errors import CudaTrouble
from nbos_kernel.gpu.grants import COOPERATIVE, GREEN, PERCENTAGE, Share
from nbos_kernel.gpu.groups import choose, tpcs_of
from tests.fakes import cuda

# -- groups -----------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.sampled_from([2, 4, 8, 12]), min_size=1, max_size=66), data=st.data())
def test_disjoint_grants_get_disjoint_groups_within_what_was_granted(sizes: list[int], data: st.DataObject) -> None:
    total = sum(sizes) // 2
    owners = data.draw(st.lists(st.integers(0, 3), min_size=total, max_size=total))
    taken: set[int] = set()
    for owner in range(4):
        granted = {tpc for tpc in range(total) if owners[tpc] == owner}
        try:
            groups = choose(sizes, granted)
        except CudaTrouble:
            continue
        assert not taken & set(groups)
        assert {tpc for group in groups for tpc in tpcs_of(sizes)[group]} <= granted
        taken |= set(groups)


def test_a_group_that_is_not_granted_whole_is_left_out() -> None:
    assert choose([4, 4, 4], [0, 1, 2]) == [0]
    with pytest.raises(CudaTrouble, match=r"2 at a time.*ask for at least 3 TPCs"):
        choose([4, 4, 4], [1, 2])


def test_a_tpc_that_this_process_does_not_see_is_named() -> None:
    with pytest.raises(CudaTrouble, match=r"TPC 7, this process sees 3 TPCs.*MPS limit"):
        choose([2, 2, 2], [1, 7])


# -- the driver -------------------------------------------------------------------------------------------------------

SLICES = """
import ctypes, json
from nbos_kernel.gpu.driver import Driver
from nbos_kernel.gpu.slices import Slices
library = ctypes.CDLL("libcuda.so.1")
def sms(slice):
    out = (ctypes.c_int * 512)()
    return list(out[:library.fake_sms_of(ctypes.c_void_p(slice.stream), out)])
slices = Slices(Driver(), 0)
"""


def test_a_slice_is_the_sms_of_its_tpcs() -> None:
    program = SLICES + "print(json.dumps([sms(slices.get(t)) for t in (range(0, 3), range(3, 66))] + [slices.tpcs]))"
    one, two, total = json.loads(cuda.run(program))
    assert (one, two, total) == (list(range(6)), list(range(6, 132)), 66)


def test_an_odd_remainder_belongs_to_the_last_tpcs() -> None:
    program = SLICES + "print(json.dumps([sms(slices.get(range(64, 66))), slices.tpcs]))"
    assert json.loads(cuda.run(program, FAKE_CUDA_SMS="132", FAKE_CUDA_GRAIN="8")) == [[128, 129, 130, 131], 66]


def test_slices_are_made_once_and_not_without_end() -> None:
    """Each has a pool of memory in torch's allocator."""
    program = SLICES + (
        "a = [slices.get(range(i, i + 4)) for i in (0, 8, 16, 24, 32)]\n"
        "again = slices.get(range(8, 12)) is a[1]\n"
        "within = slices.get(range(7, 13))\n"  # the sixth: the one that lies within it is good enough
        "beside = slices.get(range(9, 13))\n"  # that one has a TPC that was not granted
        "far = slices.get(range(40, 44))\n"  # nothing lies within it
        "print(json.dumps([again, within is a[1], sorted(far.tpcs), sorted(beside.tpcs), library.fake_contexts()]))"
    )
    assert json.loads(cuda.run(program)) == [True, True, [40, 41, 42, 43], [9, 10, 11, 12], 7]


TROUBLE = """
from nbos_kernel.gpu.driver import Driver
from nbos_kernel.gpu.errors import CudaTrouble
from nbos_kernel.gpu.slices import Slices
import ctypes
try:
    Slices(Driver(), 0).get([1, 2])
except CudaTrouble as err:
    print(err)
print(ctypes.CDLL("libcuda.so.1").fake_contexts(), "contexts")
"""


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("cuInit:100", "shows no device"),
        ("cuInit:805", "the MPS daemon does not answer; ask the administrator to look at nvidia-cuda-mps-control"),
        ("cuDeviceGetDevResource:801", "does not support it"),
        ("cuGreenCtxCreate:800", "not permitted"),
        ("cuGreenCtxCreate:2", "no memory left"),
        ("cuGreenCtxStreamCreate:2", "no memory left"),
        ("cuDevSmResourceSplitByCount:999", "does not answer any more"),
        ("cuDevResourceGenerateDesc:4711", "cuDevResourceGenerateDesc failed: CUDA error 4711"),
    ],
)
def test_what_the_driver_refuses_is_explained_and_leaves_nothing_behind(fails: str, says: str) -> None:
    said = cuda.run(TROUBLE, FAKE_CUDA_FAIL=fails)
    assert says in said
    assert said.endswith("0 contexts\n")


def test_a_driver_from_before_green_contexts_is_named_with_the_one_that_is_needed() -> None:
    said = cuda.run(TROUBLE, old=True)
    assert "(CUDA 12.2) has no cuDeviceGetDevResource; slices need driver 550 (CUDA 12.4) or newer" in said


def test_without_a_driver_the_library_is_named() -> None:
    said = cuda.run(TROUBLE.replace("print(ctypes", "#"), LD_LIBRARY_PATH="/nowhere")
    assert "libcuda.so.1 cannot be loaded" in said


def test_the_played_driver_declares_what_cuda_h_does() -> None:
    if not cuda.headers():
        pytest.skip("no cuda.h on this machine; CUDA_INCLUDE names its folder")
    cuda.check()


# -- confinement ------------------------------------------------------------------------------------------------------

PLAYED_TORCH = """
import ctypes, json, os
from types import SimpleNamespace
from nbos_kernel.gpu.confine import Confinement
from nbos_kernel.gpu.grants import Share
library = ctypes.CDLL("libcuda.so.1")
class Stream:
    def __init__(self, handle, device=0):
        self.handle, self.device_index, self.waited = handle, device, []
    def wait_stream(self, other): self.waited.append(other)
    def __eq__(self, other): return self.handle == other.handle
default = Stream(0)
state = [default]
cuda = SimpleNamespace(ExternalStream=Stream, current_stream=lambda n: state[0],
    set_stream=lambda s: state.__setitem__(0, s))
torch = SimpleNamespace(cuda=cuda)
def sms():
    out = (ctypes.c_int * 512)()
    return list(out[:library.fake_sms_of(ctypes.c_void_p(state[0].handle), out)])
def share(tpcs, whole=False):
    return Share("GPU-a", 0, "m", tuple(tpcs), 1, whole, False, "green", "", 66, "/mps")
os.environ["CUDA_MPS_PIPE_DIRECTORY"] = "/mps"
confinement = Confinement()
"""


def test_a_cells_stream_runs_on_its_slice_and_the_one_before_comes_back() -> None:
    program = PLAYED_TORCH + (
        "held = confinement.enter(torch, 0, share([2, 3]))\n"
        "inside, waited = sms(), state[0].waited == [default]\n"
        "confinement.leave(torch)\n"
        "print(json.dumps([held.mechanism, held.tpcs, held.reason, inside, waited, state[0] is default]))"
    )
    assert json.loads(cuda.run(program)) == ["green", 2, "", [4, 5, 6, 7], True, True]


def test_a_cell_that_moves_is_on_the_smaller_slice_also_when_a_stream_of_before_comes_back() -> None:
    program = PLAYED_TORCH + (
        "confinement.enter(torch, 0, share(range(8)))\n"
        "wide = state[0]\n"
        "held = confinement.move(torch, 0, share([2, 3]))\n"
        "small, on = sms(), sorted(confinement.on(share([2, 3])))\n"
        "cuda.set_stream(wide)\n"  # as the end of `with torch.cuda.stream(…)` does
        "confinement.move(torch, 0, share([2]))\n"
        "smaller = sms()\n"
        "own = Stream(1)\n"
        "cuda.set_stream(own)\n"
        "confinement.move(torch, 0, share([3]))\n"
        "kept = state[0] is own\n"
        "cuda.set_stream(wide)\n"
        "confinement.leave(torch)\n"
        "print(json.dumps([held.tpcs, small, on, smaller, kept, state[0] is default]))"
    )
    assert json.loads(cuda.run(program)) == [2, [4, 5, 6, 7], [2, 3], [4, 5], True, True]


def test_where_the_smaller_slice_cannot_be_made_the_cell_is_cooperative_and_off_the_larger_one() -> None:
    program = PLAYED_TORCH + (
        "confinement.enter(torch, 0, share(range(8)))\n"
        "held = confinement.move(torch, 0, share([70]))\n"
        "print(held.mechanism, state[0] is default)"
    )
    assert cuda.run(program) == "cooperative True\n"


def test_a_whole_device_is_not_confined() -> None:
    program = PLAYED_TORCH + "print(confinement.enter(torch, 0, share(range(66), True)).tpcs, state[0] is default)"
    assert cuda.run(program) == "66 True\n"


def test_a_stream_that_the_cell_set_for_good_is_left_to_it() -> None:
    program = PLAYED_TORCH + (
        "confinement.enter(torch, 0, share([2]))\nown = Stream(1)\ncuda.set_stream(own)\n"
        "confinement.leave(torch)\nprint(state[0] is own)"
    )
    assert cuda.run(program) == "True\n"


def test_groups_that_do_not_fit_are_told() -> None:
    program = PLAYED_TORCH + "print(confinement.enter(torch, 0, share([2, 3, 4])))"
    said = cuda.run(program, FAKE_CUDA_GRAIN="4")
    assert "tpcs=2" in said
    assert "3 TPCs were granted; the driver's groups leave 1 of them out" in said


def test_a_slice_that_cannot_be_made_is_called_cooperative_and_the_cell_runs() -> None:
    program = PLAYED_TORCH + "print(confinement.enter(torch, 0, share([2])), state[0] is default)"
    said = cuda.run(program, FAKE_CUDA_FAIL="cuGreenCtxCreate:2")
    assert "mechanism='cooperative'" in said
    assert "no memory left" in said
    assert said.endswith("True\n")


def share(mechanism: str, tpcs: int, whole: bool = False) -> Share:
    return Share("GPU-a", 0, "m", tuple(range(tpcs)), 1, whole, False, mechanism, "no MPS", 66, "/mps")


def no_driver() -> Any:
    raise AssertionError("the driver is not asked")


def test_what_the_host_offers_as_cooperative_asks_no_driver() -> None:
    assert Confinement(no_driver).enter(None, 0, share(COOPERATIVE, 8)) == Held(COOPERATIVE, 0, "no MPS")


def test_the_mps_limit_is_set_while_cuda_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    held = Confinement(no_driver, lambda path: path == "/mps/control")
    held.prepare(environ, [share(PERCENTAGE, 33)])
    assert environ == {confine.LIMIT: "50", confine.PIPE: "/mps"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    held.started()
    assert held.enter(None, 0, share(PERCENTAGE, 33)) == Held(PERCENTAGE, 33)
    wider = held.enter(None, 0, share(PERCENTAGE, 66, whole=True))
    assert (wider.mechanism, wider.tpcs) == (PERCENTAGE, 33)
    assert "started in this process with 50 %" in wider.reason
    assert "restart the kernel for the 100 %" in wider.reason


def test_a_process_that_started_without_the_mps_limit_is_cooperative(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Confinement(no_driver, lambda path: path == "/mps/control")
    environ = {confine.LIMIT: "20"}
    held.prepare(environ, [share(GREEN, 33)])
    assert environ == {confine.PIPE: "/mps"}  # green contexts want no limit
    monkeypatch.setenv(confine.PIPE, "/mps")
    monkeypatch.delenv(confine.LIMIT, raising=False)
    held.started()
    assert held.enter(None, 0, share(PERCENTAGE, 33)).mechanism == COOPERATIVE


def test_a_process_that_started_before_mps_was_there_is_cooperative(monkeypatch: pytest.MonkeyPatch) -> None:
    held, environ = Confinement(no_driver), dict[str, str]()
    held.prepare(environ, [])
    assert environ == {confine.PIPE: confine.NO_PIPE}  # an MPS daemon at the usual place is not joined by chance
    monkeypatch.setenv(confine.PIPE, confine.NO_PIPE)
    held.started()
    for mechanism in (GREEN, PERCENTAGE):
        is_held = held.enter(None, 0, share(mechanism, 33))
        assert is_held.mechanism == COOPERATIVE
        assert "before this host's MPS daemon was there" in is_held.reason
        assert "restart the kernel" in is_held.reason


def test_limits_of_disjoint_slices_never_exceed_the_device() -> None:
    for tpcs in range(1, 66):
        parts = [confine.percentage([share(PERCENTAGE, n)]) for n in (tpcs, 66 - tpcs)]
        assert sum(parts) <= 100 or 1 in parts


def test_pipes_that_a_container_does_not_see_are_not_taken_for_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    held, environ = Confinement(no_driver, lambda path: False), dict[str, str]()
    held.prepare(environ, [share(GREEN, 33)])
    assert environ == {confine.PIPE: confine.NO_PIPE}
    monkeypatch.setenv(confine.PIPE, confine.NO_PIPE)
    held.started()
    found = held.enter(None, 0, share(GREEN, 33))
    assert found.mechanism == COOPERATIVE
    assert "restart the kernel" in found.reason
