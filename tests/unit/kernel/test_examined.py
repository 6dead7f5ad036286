"""What a cell makes the capture look at, and how much of it counts as new: it costs what the cell touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbos_kernel.capture import buffers, compare, pickling
from nbos_kernel.entries import Memory
from tests.unit.kernel.pair import Pair, Side


def examined(side: Side, code: str) -> tuple[int, int]:
    """How many components a cell made the capture look at, and the bytes in new chunks."""
    side.run(code)
    taken = side.replica.take_changes(code)
    found, fresh = taken.changes.examined, sum(packed.fresh for packed in taken.changes.components)
    side.replica.own(0)
    del taken
    for _ in side.replica.capture.settle():
        pass
    return found, fresh


KEPT = [
    "import matplotlib\nmatplotlib.use('agg')\nimport matplotlib.pyplot as plt\n"
    "kept, ax = plt.subplots()\nax.plot([1, 2, 3], marker='o')\nax.set_title('t')\n"
    "image = ax.imshow([[1, 2], [3, 4]], cmap='viridis')\nkept.colorbar(image)\n"
    "kept.canvas.draw()\nplt.close('all')",
    "import numpy as np\nkept = np.random.default_rng(7)",
    "import numpy as np\nfrom sklearn.ensemble import RandomForestRegressor\n"
    "kept = RandomForestRegressor(2, random_state=0).fit(np.eye(9), np.arange(9.0))",
    "import numpy as np\nfrom sklearn.ensemble import HistGradientBoostingRegressor\n"
    "kept = HistGradientBoostingRegressor(max_iter=2, random_state=0).fit(np.random.rand(50, 3), np.arange(50.0))",
]


@pytest.mark.parametrize("make", KEPT, ids=["figure", "generator", "forest", "boosting"])
def test_what_only_library_constants_hold_is_left_alone(make: str) -> None:
    side = Side({})
    examined(side, make)
    assert examined(side, "x = 1")[0] == 0
    assert examined(side, "kept")[0] > 0  # but is looked at when it is named


def test_a_tuple_with_something_in_it_that_a_library_can_change_exposes() -> None:
    side = Side({})
    examined(side, "import linecache\nlist_ = [1]\nkept = (list_,)\nlinecache.held = kept\ndel list_")
    assert examined(side, "linecache.held[0].append(2)")[0] > 0


APART = {
    "frames": "import pandas as pd, numpy as np\n"
    "one = pd.DataFrame({'a': np.arange(9), 'b': 'x'})\nother = pd.DataFrame({'a': np.zeros(5), 'b': 'y'})",
    "a frame and an index": "import pandas as pd\n"
    "one = pd.date_range('2025-01-01', periods=9)\nother = pd.DataFrame({'t': pd.date_range('2025-02-01', periods=5)})",
    "figures": "import matplotlib\nmatplotlib.use('agg')\nimport matplotlib.pyplot as plt\n"
    "one, ax = plt.subplots()\nax.plot([1, 2], marker='o')\nother, bx = plt.subplots()\n"
    "bx.plot([2, 1], marker='o')\none.canvas.draw()\nother.canvas.draw()\nplt.close('all')",
}


@pytest.mark.parametrize("make", APART.values(), ids=APART.keys())
def test_what_only_a_librarys_functions_types_or_constants_tie_stands_apart(make: str) -> None:
    pair = Pair()
    for component in pair.cell(make)["components"]:
        assert not {"one", "other"} <= set(component["names"])
    examined(pair.executor, "x = 1")
    assert examined(pair.executor, "y = 1")[0] == 0
    pair.executor.run("one, other")  # and each of them comes back whole
    assert pair.on_standby("type(one).__name__, type(other).__name__") == pair.executor.eval(
        "(type(one).__name__, type(other).__name__)"
    )


def test_figures_that_stand_apart_are_pickled_alike_every_time() -> None:
    side = Side({})
    examined(side, APART["figures"])
    assert examined(side, "str(one), str(other)")[1] < 1000  # the result itself


def test_views_of_an_index_that_stand_apart_expose_nobody() -> None:
    side = Side({})
    examined(
        side, "import pandas as pd, numpy as np\nframe = pd.DataFrame({'a': np.arange(9)})\nsplit = frame['a'] > 4"
    )
    examined(side, "one = frame.loc[3]; two = split.loc[3]; del one, two")  # which fills what the two keep in common
    assert examined(side, "x = 1")[0] == 0
    assert examined(side, "split")[0] > 0


def at_once(side: Side, code: str) -> int:
    """As `examined`, for a cell that the next one follows without a pause."""
    side.run(code)
    taken = side.replica.take_changes(code)
    found = taken.changes.examined
    side.replica.own(0)
    del taken
    for _ in side.replica.capture.settle(in_vain=1):
        pass
    return found


def test_what_no_cell_names_is_left_alone_though_cells_follow_each_other() -> None:
    side = Side({})
    at_once(side, KEPT[0])
    assert at_once(side, "x = 1") > 0  # nobody has had the time to look into it
    assert at_once(side, "x = 2") == 0
    assert at_once(side, "kept") > 0


def test_a_figure_that_did_not_change_is_not_written_again() -> None:
    side = Side({})
    examined(side, KEPT[0])
    assert examined(side, "str(kept)")[1] < 1000  # the result itself


def test_results_that_move_on_do_not_make_large_values_new() -> None:
    side = Side({})
    examined(side, "import pandas as pd, numpy as np\nframe = pd.DataFrame(np.random.rand(50_000, 4))")
    examined(side, "frame.head()")
    assert examined(side, "frame.tail()")[1] < 100_000
    assert examined(side, "1 + 1")[1] < 100_000


def test_chunks_are_known_wherever_they_stand() -> None:
    parts = [np.random.default_rng(n).bytes(buffers.ALONE + n) for n in range(3)]
    marks = [buffers.frame(part).marks for part in parts]
    table = buffers.known(marks)
    again = [buffers.frame(part, None, table) for part in parts]
    assert [each.fresh for each in again] == [0, 0, 0]
    assert [each.marks for each in again] == marks
    assert buffers.frame(parts[0][:-1] + b"?", None, table).fresh > 0


def test_parts_of_a_larger_object_are_replicated_with_it() -> None:
    pair = Pair()
    pair.cell("whole = {n: [n] for n in range(30_000)}\npart = whole[7]\nother = whole[8]")
    pair.cell("part.append(1)")
    pair.cell("other.append(2)")
    assert pair.on_standby("part is whole[7] and other is whole[8] and part == [7, 1] and other == [8, 2]")


WHOLE = "import numpy as np\nwhole = {n: [n] for n in range(30_000)}\n"


def alone(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Grows by the names of each pickle that is made."""
    made: list[tuple[str, ...]] = []

    def dump(values: dict[str, Any], *more: Any) -> Any:
        made.append(tuple(values))
        return pickling.dump(values, *more)

    monkeypatch.setattr(compare, "dump", dump)
    return made


OF_PARTS = [
    "[whole[7], 5, whole[8]]",
    "(whole[7], 5)",
    "np.array([[whole[7], 5]], object)",
    "np.array([[whole[7], 5]], object).T.T",
]


@pytest.mark.parametrize("kept", OF_PARTS)
def test_a_container_of_nothing_but_parts_is_pickled_with_them_only(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, pair = alone(monkeypatch), Pair()
    pair.cell(f"{WHOLE}held = {kept}")
    assert [names for names in made if "held" in names] == [("held", "whole")]
    pair.cell("whole[7].append('more')")
    first = "held[0]" if not kept.startswith("np") else "held[0, 0]"
    assert pair.on_standby(f"{first} is whole[7] and {first} == [7, 'more']")


def test_views_of_one_array_of_parts_stay_views_of_one() -> None:
    pair = Pair()
    pair.cell(f"{WHOLE}owner = np.array([[whole[7], whole[8], 5]], object)\nheld = owner.squeeze()\nlast = held[1:]")
    assert pair.on_standby("held[1] is whole[8] and last[0] is whole[8]")
    pair.cell("last[0] = whole[9]")
    assert pair.on_standby("held[1] is whole[9] and last.base is held.base is owner")


def test_a_container_of_a_part_and_of_what_cannot_be_pickled_is_lost_alone() -> None:
    pair = Pair()
    entry = pair.cell(f"{WHOLE}held = [whole[7], (n for n in ())]")
    assert list(entry["lost"]) == ["held"]
    assert pair.on_standby("whole[7] == [7] and len(whole) == 30_000")


@given(sizes=st.lists(st.integers(0, 600), max_size=12), changed=st.lists(st.integers(0, 11)))
def test_buffers_marked_together_are_marked_as_one_by_one(sizes: list[int], changed: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(buffers, "CHUNK", 64)
        patched.setattr(buffers, "ALONE", 128)
        parts = [np.random.default_rng(number).bytes(size) for number, size in enumerate(sizes)]
        before = [each.marks for each in buffers.frames(parts, [None] * len(parts))]
        assert before == [buffers.frame(part).marks for part in parts]
        for number in changed:
            if number < len(parts) and parts[number]:
                parts[number] = bytes([parts[number][0] ^ 1]) + parts[number][1:]
        one_by_one = tuple(buffers.frame(part, marks) for part, marks in zip(parts, before, strict=True))
        assert buffers.frames(parts, before) == one_by_one
        assert sum(each.fresh for each in one_by_one) <= 64 * len(set(changed))


def frames(*sizes: int) -> list[tuple[tuple[str, ...], Any]]:
    return [((f"hash {number}",), np.zeros(size, np.uint8)) for number, size in enumerate(sizes)]


def test_a_standby_keeps_what_is_the_same_and_uses_other_memory_again() -> None:
    memory, held = Memory(), frames(8, 8)
    memory.keep(["a"], held)
    taken = memory.take(["a"], [(8, ("new",)), (8, ("hash 0",)), (8, ("newer",))])
    assert taken[1][0] is held[0][1]
    assert taken[1][1] == {0}
    assert taken[0][0] is held[1][1]
    assert taken[0][1] == set()
    assert all(taken[2][0] is not each for _, each in held)


def test_memory_of_other_variables_is_not_used() -> None:
    memory, held = Memory(), frames(8)
    memory.keep(["a"], held)
    ((found, there),) = memory.take(["b"], [(8, ("hash 0",))])
    assert found is not held[0][1]
    assert there == set()


def test_memory_that_another_variable_lies_in_is_left_alone() -> None:
    pair = Pair()
    pair.cell("import numpy as np\na = np.zeros(100_000)\nb = a")
    pair.cell("del a")
    pair.cell("a = np.ones(100_000)")
    assert pair.on_standby("not b.any() and a.all()")
    pair.cell("c = b\nb = np.full(100_000, 2.0)")
    assert pair.on_standby("not c.any() and b[0] == 2 and a.all()")


def test_memory_of_a_component_is_shared_out_within_an_entry() -> None:
    memory, held = Memory(), frames(8)
    memory.keep(["a", "b"], held)
    memory.begin(["a"])
    assert memory.take(["a"], [(8, ("hash 0",))])[0][0] is not held[0][1]
    memory.begin(["a", "b"])
    assert memory.take(["a"], [(8, ("new",))])[0][0] is not held[0][1]
    assert memory.take(["a"], [(8, ("hash 0",))])[0][0] is held[0][1]
