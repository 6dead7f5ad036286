"""When a replication is shown, what it says, and what is about to cost much: the decisions, by a made-up clock."""

from __future__ import annotations

import pytest

from nbos_kernel.costs import IN_A_ROW, LARGE, OFTEN, Cost, Costs, room
from nbos_kernel.progress import EVERY, MOMENT, SHOW_AFTER, STILL, Progress, listing

MIB, GIB = 1 << 20, 1 << 30


def started(total: int = 4 * GIB, names: tuple[str, ...] = ("df",)) -> Progress:
    progress = Progress(7, 100.0)
    progress.captured([(("%random",), 10), (names, total)], 100.0)
    progress.sending(total)
    return progress


def test_what_is_over_soon_is_never_shown() -> None:
    progress = started()
    progress.stored(2 * GIB)
    assert progress.look(100.0 + SHOW_AFTER - 0.01) is None
    progress.over(100.0 + SHOW_AFTER)
    assert progress.look(100.0 + 2 * SHOW_AFTER) is None


def test_a_long_one_tells_how_far_it_is_and_how_long_it_takes() -> None:
    progress = started()
    progress.stored(GIB)
    look = progress.look(102.0)
    assert look is not None
    assert look.text == "replicating 4.00 GiB of df: 25 %, 6.0 s left"
    assert look.wire(7) == {
        "n": 7, "what": "4.00 GiB of df", "text": look.text, "done": GIB, "total": 4 * GIB, "left": 6.0, "seconds": 2.0,
    }  # fmt: skip


def test_it_is_not_begun_to_be_shown_when_it_is_about_to_end() -> None:
    progress = started()
    progress.stored(4 * GIB - 50 * MIB)
    assert progress.look(100.0 + SHOW_AFTER) is None  # at 4 GiB a second, 50 MiB are a hundredth of one
    assert progress.look(100.0 + 100) is not None  # by then it has hung


def test_the_estimate_follows_the_speed_of_the_last_seconds() -> None:
    progress = started(1000 * MIB)
    at = 100.0
    for _ in range(20):  # 10 s at 20 MiB/s
        at += EVERY
        progress.stored(10 * MIB)
        progress.look(at)
    for _ in range(8):  # 4 s at 100 MiB/s: longer than the window
        at += EVERY
        progress.stored(50 * MIB)
        progress.look(at)
    look = progress.look(at)
    assert look is not None
    assert look.left == pytest.approx((1000 - 200 - 400) / 100, rel=0.05)


def test_what_hangs_says_for_how_long_and_why() -> None:
    progress = started()
    progress.stored(GIB)
    assert progress.look(102.0) is not None
    for at in (103.0, 104.0, 105.5):
        hung = progress.look(at)
    assert hung is not None
    assert hung.left is None
    assert "nothing has moved for 4 s" in hung.text
    assert STILL < 3.5
    progress.trouble = "etcd does not answer"
    blamed = progress.look(106.0)
    assert blamed is not None
    assert blamed.text == "replicating 4.00 GiB of df: 25 %; etcd does not answer"


def test_before_and_after_the_blobs() -> None:
    progress = Progress(7, 100.0)
    first = progress.look(102.0)
    assert first is not None
    assert first.text == "looking for what the cell changed, for 2 s so far"
    progress.captured([(("a", "b", "c", "d", "e"), 2048)], 102.0)
    entry = progress.look(103.0)
    assert entry is not None
    assert entry.text == "replicating 2.0 KiB of a, b, c and 2 others: its log entry is being written"
    progress.sending(100)
    progress.stored(100)
    progress.logging(104.0)
    assert "log entry" in progress.text(104.0)


def test_sent_again_is_more_to_send_and_never_beyond_the_whole() -> None:
    progress = started(100)
    progress.stored(100)
    progress.sending(50)
    look = progress.look(103.0)
    assert look is not None
    assert (look.done, look.total) == (100, 150)
    progress.stored(500)
    assert "100 %" in progress.text(103.5)


def test_names_are_short_and_counted() -> None:
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c", "d"]) == "a, b, c and 1 other"
    assert len(listing(["x" * 500])) == 30
    assert MOMENT < SHOW_AFTER


# -- costs ----------------------------------------------------------------------------------------------------------


def test_the_first_large_capture_is_told_once() -> None:
    costs = Costs()
    assert costs.captured([Cost(("a",), LARGE - 1, 0)]) == []
    (line,) = costs.captured([Cost(("a",), 10, 0), Cost(("big", "%figures"), LARGE, 0)])
    assert "1.00 GiB" in line
    assert "most of it in big;" in line
    assert costs.captured([Cost(("big",), LARGE, 0)]) == []
    assert len(costs.captured([Cost(("other",), LARGE, 0)])) == 1


def test_a_variable_rewritten_again_and_again_is_told_once_with_a_way_out() -> None:
    costs = Costs()
    said = [costs.captured([Cost(("w", "v"), OFTEN, 0), Cost(("x",), OFTEN - 1, 0)]) for _ in range(IN_A_ROW + 2)]
    assert [len(lines) for lines in said] == [0] * (IN_A_ROW - 1) + [1, 0, 0]
    (line,) = said[IN_A_ROW - 1]
    assert "w, v" in line
    assert "768.0 MiB" in line
    assert "`del`" in line


def test_a_cell_that_leaves_it_alone_begins_the_row_anew() -> None:
    costs = Costs()
    rewritten = [Cost(("w",), OFTEN, 0)]
    assert [costs.captured(rewritten), costs.captured(rewritten), costs.captured([])] == [[], [], []]
    assert [costs.captured(rewritten), costs.captured(rewritten)] == [[], []]
    assert len(costs.captured(rewritten)) == 1


def test_no_room_in_the_store_is_told_before_it_fails() -> None:
    told = {"store": {"where": "the blob store s", "free": GIB}, "standbys": []}
    (line,) = room([Cost(("a",), 2 * GIB, 2 * GIB)], 2 * GIB, told)
    assert line.startswith("NBOS: the blob store s has 1.00 GiB left, and this cell's changes need 2.00 GiB")
    assert room([Cost(("a",), 2 * GIB, 2 * GIB)], GIB, told) == []
    assert room([Cost(("a",), 2 * GIB, 0)], 2 * GIB, {"store": {"where": "s3", "free": None}}) == []
    assert room([Cost(("a",), 2 * GIB, 0)], 2 * GIB, {}) == []


def test_no_room_in_a_standbys_memory_counts_what_grew() -> None:
    told = {"standbys": [{"replica": 1, "host": "b", "free": GIB}, {"replica": 2, "host": "c", "free": 9 * GIB}]}
    (line,) = room([Cost(("a",), 2 * GIB, 2 * GIB)], 2 * GIB, told)
    assert "host b has 1.00 GiB" in line
    assert "lazy" in line
    assert room([Cost(("a",), 2 * GIB, 0)], 2 * GIB, told) == []  # rewritten where it lies
    assert room([Cost(("a",), 2 * GIB, GIB), Cost(("b",), 0, -GIB)], 0, told) == []  # exactly what there is
    together = {"standbys": [{"replica": i, "host": "b", "free": 3 * GIB} for i in (1, 2)]}
    assert len(room([Cost(("a",), 2 * GIB, 2 * GIB)], 0, together)) == 1  # two on one host need it twice
    assert room([Cost(("a",), 2 * GIB, 2 * GIB)], 0, {"standbys": [{"replica": 1, "host": "b", "free": None}]}) == []
