"""The played device follows its model: durations to the digit, shares, memory, copies, faults."""

from __future__ import annotations

import math

import pytest

from nbos_cluster.simdevice import (
    Device,
    DeviceFault,
    Done,
    EqualShares,
    Failed,
    Kernel,
    OutOfMemory,
    Sharing,
    Slices,
    TimeSlices,
)

GEMM = Kernel(m=0.66, b=0.002)


def slices(first: int, count: int) -> frozenset[int]:
    return frozenset(range(first, first + count))


@pytest.mark.parametrize(("tpcs", "seconds"), [(66, 0.012), (33, 0.022), (1, 0.662)])
def test_a_kernel_takes_m_over_t_plus_b(tpcs: int, seconds: float) -> None:
    device = Device(66)
    device.open("a", slices(0, tpcs))
    device.launch("a", GEMM, "k")
    (done,) = device.advance(10)
    assert done == Done("a", "k", pytest.approx(seconds))


def test_tpcs_beyond_a_kernels_width_change_nothing() -> None:
    narrow = Kernel(m=0.1, width=10)
    assert narrow.seconds(66) == narrow.seconds(10) == pytest.approx(0.01)
    assert narrow.seconds(5) == pytest.approx(0.02)


def test_a_stream_keeps_its_order_and_disjoint_slices_do_not_feel_each_other() -> None:
    device = Device(66)
    device.open("a", slices(0, 33))
    device.open("b", slices(33, 33))
    for tag in (1, 2):
        device.launch("a", GEMM, tag)
    device.launch("b", GEMM, 3)
    done = device.advance(1)
    assert [(d.tag, d.at) for d in done] == [
        (1, pytest.approx(0.022)),
        (3, pytest.approx(0.022)),
        (2, pytest.approx(0.044)),
    ]


def test_a_moved_slice_waits_for_the_kernel_that_stands_on_it_and_grows_when_it_ends() -> None:
    device = Device(66)
    device.open("borrower", slices(0, 66))
    device.open("owner", slices(0, 66))
    device.launch("borrower", Kernel(m=0.66), "long")
    device.advance(0.005)
    device.confine("borrower", slices(33, 33))
    device.launch("borrower", Kernel(m=0.33), "next")
    device.confine("owner", slices(0, 33))
    device.launch("owner", Kernel(m=0.33), "cell")
    device.advance(0.005)
    assert device.holds("owner") == frozenset()
    assert [(d.tag, d.at) for d in device.advance(1)] == [
        ("long", pytest.approx(0.01)),
        ("next", pytest.approx(0.02)),
        ("cell", pytest.approx(0.02)),
    ]


def test_what_was_launched_ahead_stays_on_the_slice_of_its_launch() -> None:
    device = Device(66)
    device.open("borrower")
    device.launch("borrower", Kernel(m=0.66), "first")
    device.launch("borrower", Kernel(m=0.66), "ahead")
    device.confine("borrower", slices(0, 33))
    device.launch("borrower", Kernel(m=0.66), "after")
    assert [d.at for d in device.advance(1)] == [pytest.approx(0.01), pytest.approx(0.02), pytest.approx(0.04)]


def test_two_that_wait_for_the_same_tpcs_do_not_both_get_them() -> None:
    device = Device(66)
    for client in "abc":
        device.open(client)
        device.launch(client, Kernel(m=0.66), client)
    device.advance(0.015)
    assert [len(device.holds(client)) for client in "abc"] == [0, 66, 0]
    assert [d.at for d in device.advance(1)] == [pytest.approx(0.02), pytest.approx(0.03)]


def test_a_fault_frees_the_tpcs_of_what_ran() -> None:
    device = Device(66)
    for client in "ab":
        device.open(client)
        device.launch(client, Kernel(m=0.66), client)
    device.advance(0.005)
    device.fault("an illegal access", "a")
    assert [(o.tag, o.at) for o in device.advance(1)] == [("a", 0.005), ("b", pytest.approx(0.015))]


def test_equal_shares_give_what_one_cannot_fill_to_the_others() -> None:
    device = Device(60, sharing=EqualShares())
    device.open("a")
    device.open("b")
    device.launch("a", Kernel(m=0.1, width=10), "narrow")
    device.launch("b", Kernel(m=1.0), "wide")
    assert [(d.tag, d.at) for d in device.advance(1)] == [
        ("narrow", pytest.approx(0.01)),
        ("wide", pytest.approx(0.01 + (1.0 - 50 * 0.01) / 60)),
    ]


def test_time_slices_take_turns_and_lose_the_switches() -> None:
    device = Device(66, sharing=TimeSlices(turn=0.002, switch=0.0001))
    device.open("a")
    device.open("b")
    device.launch("a", Kernel(m=0.66), 1)
    assert device.advance(0.0) == []
    device.launch("b", Kernel(m=0.66), 2)
    done = device.advance(1)
    assert [d.tag for d in done] == [1, 2]
    assert done[0].at == pytest.approx(0.010 + 4 * 0.002 + 8 * 0.0001)
    assert device.use("a")[0] == pytest.approx(0.66)


def test_copies_share_the_bandwidth() -> None:
    device = Device(66, bandwidth=50e9)
    device.open("a")
    device.open("b")
    device.copy("a", 5_000_000_000, "a")
    device.copy("b", 10_000_000_000, "b")
    assert [(d.tag, d.at) for d in device.advance(1)] == [("a", pytest.approx(0.2)), ("b", pytest.approx(0.3))]


def test_memory_runs_out_at_the_budget_and_at_the_device() -> None:
    device = Device(66, memory=100)
    device.open("a", memory=60)
    device.open("b")
    device.allocate("a", 60)
    with pytest.raises(OutOfMemory, match="a asks for"):
        device.allocate("a", 1)
    with pytest.raises(OutOfMemory):
        device.allocate("b", 41)
    device.allocate("b", 40)
    device.close("a")
    device.allocate("b", 60)
    assert device.used("b") == 100


def test_a_fault_of_one_client_leaves_the_other_alone() -> None:
    device = Device(66)
    device.open("a", slices(0, 33))
    device.open("b", slices(33, 33))
    device.launch("a", GEMM, 1)
    device.launch("a", GEMM, 2)
    device.launch("b", GEMM, 3)
    device.advance(0.01)
    device.fault("an illegal memory access", client="a")
    outcomes = device.advance(1)
    assert [(o.tag, type(o)) for o in outcomes] == [(1, Failed), (2, Failed), (3, Done)]
    with pytest.raises(DeviceFault, match="illegal"):
        device.launch("a", GEMM)


def test_a_lost_device_loses_everybody_until_it_is_reset() -> None:
    device = Device(66)
    device.open("a")
    device.allocate("a", 10)
    device.launch("a", GEMM, 1)
    device.fault("XID 79: the GPU has fallen off the bus")
    assert isinstance(device.advance(1)[0], Failed)
    device.open("b")
    with pytest.raises(DeviceFault, match="XID 79"):
        device.allocate("b", 1)
    device.repair()
    device.allocate("b", 1)
    with pytest.raises(DeviceFault):
        device.launch("a", GEMM)


@pytest.mark.parametrize("sharing", [Slices(), EqualShares(), TimeSlices()])
def test_an_idle_device_does_nothing_by_itself(sharing: Sharing) -> None:
    device = Device(66, sharing=sharing)
    device.open("a")
    assert device.next_at() == math.inf
    device.launch("a", GEMM)
    device.advance(1)
    assert device.next_at() == math.inf


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="takes some time"):
        Kernel(m=0.0)
    device = Device(4)
    with pytest.raises(ValueError, match="not on a device"):
        device.open("a", slices(2, 4))
    device.advance(1)
    with pytest.raises(ValueError, match="before"):
        device.advance(0.5)
