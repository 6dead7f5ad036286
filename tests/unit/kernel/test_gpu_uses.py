"""What a kernel's latest cells got of the GPUs is kept, replicated, and shown by `%nbos gpu`."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from nbos_kernel.gpu import budget
from nbos_kernel.gpu.grants import Grant, Share
from nbos_kernel.gpu.uses import KEPT, NAME, Uses
from nbos_kernel.reports.gpuview import amounts, seconds, text

GIB = 1 << 30
SLICE = Share("GPU-a", 0, "H200", tuple(range(16)), 20 * GIB, False, True, of=66)
GRANT = Grant("g", "host-a", 1, (SLICE,))
DEVICE = {"index": 0, "model": "H200", "tpcs": 66, "memory": 141 * GIB, "healthy": True, "reason": ""}
STATUS: dict[str, Any] = {
    "host": "host-a",
    "gpu": {
        "most": {"gpus": 4, "tpcs": 132, "memory": 80 * GIB},
        "default": {"gpus": 0, "tpcs": 0, "memory": 0},
        "devices": [{**DEVICE, "tpcs_free": 50, "memory_free": 121 * GIB}],
    },
    "queue": [],
}


def after(*cells: tuple[float, float]) -> Uses:
    """Cells that waited and held so long."""
    uses = Uses()
    for n, (waited, held) in enumerate(cells, 1):
        uses.begin(GRANT, n, waited, 100.0)
        uses.end(100.0 + held, 3 * GIB, n)
    return uses


def test_a_cell_without_a_grant_leaves_nothing() -> None:
    uses = Uses()
    uses.begin(None, 1, 0.0, 100.0)
    assert uses.running(101.0) is None
    uses.end(102.0, 0, 1)
    assert (uses.rows, list(uses.variable()), uses.of(1, 103.0, 0)) == ([], [], {})


def test_what_a_cell_has_used_is_told_while_it_runs_and_when_it_has_given_back() -> None:
    uses = Uses()
    uses.begin(GRANT, 7, 2.5, 100.0)
    running = uses.of(7, 104.0, GIB)
    assert (running["held"], running["tpcs"], running["waited"], running["peak"]) == (4.0, 16, 2.5, GIB)
    uses.end(105.0, 2 * GIB, 3)
    ended = uses.of(7, 200.0, 0)
    assert (ended["held"], ended["peak"], ended["count"]) == (5.0, 2 * GIB, 3)
    assert uses.of(8, 200.0, 0) == {}


def test_the_latest_are_kept_and_another_replica_has_them_too() -> None:
    uses = after(*[(float(n), 1.0) for n in range(KEPT + 5)])
    assert [row.waited for row in uses.rows] == [float(n) for n in range(5, KEPT + 5)]
    ((name, said),) = uses.variable()
    standby = Uses()
    standby.adopt(said, whole=False)
    assert (name, standby.rows, list(standby.variable())) == (NAME, uses.rows, [(name, said)])
    standby.adopt(None, whole=False)  # an entry that says nothing of it
    assert standby.rows == uses.rows
    standby.adopt("[[1, 2]]", whole=False)  # of a version that keeps something else
    assert standby.rows == []
    standby.adopt(said, whole=False)
    standby.adopt(None, whole=True)  # the kernel was restarted
    assert (standby.rows, list(standby.variable())) == ([], [])


def test_torchs_memory_is_counted_anew_for_each_cell_and_not_at_all_where_it_cannot_be() -> None:
    calls: list[Any] = []
    cuda = SimpleNamespace(
        get_device_properties=lambda number: SimpleNamespace(total_memory=40 * GIB),
        set_per_process_memory_fraction=lambda *given: calls.append(given),
        reset_peak_memory_stats=lambda number: calls.append(("anew", number)),
        max_memory_allocated=lambda number: 5 * GIB,
    )
    torch = SimpleNamespace(cuda=cuda)
    budget.bind(torch, 1, SLICE)
    assert calls == [(0.5, 1), ("anew", 1)]
    assert budget.peak(torch, 1) == 5 * GIB

    def no_count(number: int) -> int:
        raise RuntimeError("the allocator does not support getDeviceStats")

    cuda.max_memory_allocated = cuda.reset_peak_memory_stats = no_count
    budget.bind(torch, 1, SLICE)
    assert budget.peak(torch, 1) == 0


def test_the_text_says_what_may_be_used_what_is_held_and_what_cells_got() -> None:
    uses = after((0.0, 2.0), (75.0, 4.2))
    uses.begin(GRANT, 3, 1.5, 100.0)
    lines = text(STATUS, uses.rows, uses.running(108.0, GIB), GRANT, ()).splitlines()
    assert lines[0] == (
        "a cell of this kernel may use: 4 GPUs or 132 TPCs, 80.0 GiB on each; without a first line %%gpu or %%cpu: "
        "no GPU"
    )
    assert lines[1].startswith("this cell holds: 16 TPCs of 66, 20.0 GiB on H200 GPU-a; simulated")
    assert lines[2] == "  for 8.0 s so far, after 1.5 s of waiting, at most 1.00 GiB of its memory used by torch"
    assert lines[3] == "on host-a: GPU 0, H200: 50 of 66 TPCs and 121.0 of 141.0 GiB free"
    assert lines[4] == "the latest cells with a GPU:"
    assert lines[6] == (
        "  [2]: 16 TPCs, 20.0 GiB of H200 on host-a; waited 75 s, held 4.2 s, 67 TPC·s, at most 3.00 GiB of its memory "
        "used by torch"
    )
    assert len(lines) == 7


def test_without_a_grant_it_says_how_to_get_one_and_who_waits() -> None:
    ticket = {"n": 4, "host": "host-a", "position": 1, "of": 3, "reason": "2 GPUs asked", "estimate": 300.0}
    ill = {**DEVICE, "healthy": False, "reason": "XID 79", "tpcs_free": 66, "memory_free": 1}
    status = {**STATUS, "gpu": {**STATUS["gpu"], "devices": [ill]}, "queue": [ticket], "error": "away"}
    lines = text(status, [], None, None, ()).splitlines()
    assert "%%gpu tpcs=16" in lines[1]
    assert lines[2:] == [
        "on host-a: GPU 0, H200: it cannot be used now (XID 79)",
        "waiting: execution 4, position 1 of 3 on host-a, about 5 min: 2 GPUs asked",
        "the host's daemon cannot be asked: away",
    ]
    unknown = text({**status, "queue": [{**ticket, "estimate": None}]}, [], None, None, ())
    assert "on host-a: 2 GPUs asked" in unknown


def test_a_daemon_that_says_nothing_of_gpus_is_of_an_older_version() -> None:
    assert text({"host": "a"}, [], None, None, ()).splitlines() == [
        line for line in text(STATUS, [], None, None, ()).splitlines() if line.startswith("this cell")
    ]


def test_whole_devices_are_counted_as_such() -> None:
    uses = Uses()
    uses.begin(Grant("g", "b", 1, (replace(SLICE, whole=True),) * 2), 1, 0.0, 0.0)
    uses.end(1.0, 0, 1)
    assert "  [1]: 2 GPUs, 40.0 GiB of H200 on b; waited 0.0 s, held 1.0 s, 32 TPC·s" in text(
        {}, uses.rows, None, None, ()
    )


def test_amounts_and_times_read_well() -> None:
    assert [seconds(value) for value in (0.04, 9.96, 75, 720, 12600)] == ["0.0 s", "10.0 s", "75 s", "12 min", "3.5 h"]
    assert [amounts(asked) for asked in ({"gpus": 1}, {"tpcs": 16, "memory": GIB}, {})] == [
        "1 GPU",
        "16 TPCs, 1.0 GiB on each",
        "no GPU",
    ]


def test_what_a_replica_left_on_a_device_is_shown_and_why_it_stays() -> None:
    left = [{"replica": 2, "devices": {"0": 12 << 30}, "stays": "a CUDA graph was captured"}]
    shown = text({"gpu": {"left": left}}, (), None, None, ())
    assert "replica 2 has 12.0 GiB on GPU 0 (not given back when asked: a CUDA graph was captured)" in shown
