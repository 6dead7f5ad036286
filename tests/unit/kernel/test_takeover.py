"""A replica that takes over knows what it loaded: it examines what a cell touched, and what it cannot be sure of."""

from __future__ import annotations

import numpy as np
import pytest
from xxhash import xxh3_64_hexdigest

from nbos_cluster import content
from nbos_kernel.capture.found import Changes
from tests.unit.kernel.pair import Pair, Side

KNOWN = {
    "bytes": "kept = [bytes(100_000), [1, 2.0, 'x'], {3: {4}}]",
    "arrays that share memory": "import numpy as np\nkept = np.zeros(100_000)\nother = [kept, kept[5:]]",
    "a frame and its column": "import pandas as pd\nkept = pd.DataFrame({'a': range(9_000)})\ncolumn = kept['a']",
    "a function": "kept = lambda x: x + 1",
    "dates": "import datetime, decimal\nkept = [datetime.datetime(2026, 1, 1), decimal.Decimal(3)]",
}


def captured(side: Side, code: str, look: bool = True) -> Changes:
    """What the first cell of a replica that was a standby makes of it."""
    work = side.replica.capture.look_ahead()
    for _ in work if look else ():
        pass
    side.run(code)
    return side.replica.take_changes(code).changes


def written(found: Changes) -> set[str]:
    return {name for component in found.components for name in component.names}


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_the_first_cell_examines_nothing_that_it_does_not_name(make: str) -> None:
    pair = Pair()
    pair.cell(make)
    found = captured(pair.standby, "x = 1")
    assert (found.examined, written(found)) == (0, {"x"})


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_what_it_names_is_examined_and_found_to_be_what_the_log_holds(make: str) -> None:
    pair = Pair()
    pair.cell(make)
    found = captured(pair.standby, "x = type(kept)")
    assert found.examined > 0
    assert "kept" not in written(found)


def test_what_the_first_cell_changes_is_found() -> None:
    pair = Pair()
    pair.cell("import numpy as np\na = np.zeros(2_000_000)\nb = [1]\nview = a[7:]\nn = 0")
    pair.switch()
    entry = pair.cell("view[0] = 5\nn += 1")
    (component,) = [each for each in entry["components"] if "a" in each["names"]]
    assert sorted(component["names"]) == ["a", "view"]
    assert pair.on_standby("a[7] == 5 and view[0] == 5 and n == 1")
    assert np.sum(pair.on_standby("a")) == 5


def test_only_the_chunk_that_changed_is_new() -> None:
    pair = Pair()
    pair.cell("import numpy as np\na = np.random.default_rng(1).random(2_000_000)")
    found = captured(pair.standby, "a[0] = 1")
    (component,) = found.components
    assert 0 < component.fresh <= 5 << 20 < component.size


def test_what_the_log_has_marks_of_needs_no_address_to_be_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    entry = pair.cell("import numpy as np\na = np.random.default_rng(1).random(2_000_000)")
    (frame,) = [frame for each in entry["components"] for frame in each["frames"] if "blobs" in frame]
    assert frame["marks"] == "".join(xxh3_64_hexdigest(pair.blobs[digest]) for digest in frame["blobs"])
    addressed: list[int] = []
    monkeypatch.setattr(content, "address", lambda part: addressed.append(len(part)) or "0" * 64)
    assert written(captured(pair.standby, "x = a")) == {"x", "a"}  # they share it now
    assert sum(addressed) < 1 << 20


def test_nobody_having_looked_everything_is_examined() -> None:
    pair = Pair()
    pair.cell("a = [1]\nb = {2: [3]}")
    assert captured(pair.standby, "x = 1", look=False).examined == 2


def test_a_callback_that_ran_before_anybody_looked_has_everything_examined() -> None:
    pair = Pair()
    pair.cell("a = [1]\nb = {2: [3]}")
    pair.standby.replica.capture.before_other_code()
    assert captured(pair.standby, "x = 1").examined == 2


MADE_ANEW = """
import os
class Mark:
    def __init__(self): self.own = [os.urandom(8)]
    def __getstate__(self): return {"own": self.own}
    def __setstate__(self, state): self.own = [os.urandom(8)]
mark, plain = Mark(), [1]
"""


def test_what_may_be_another_value_on_each_replica_is_compared_once_and_written() -> None:
    pair = Pair()
    pair.cell(MADE_ANEW)
    pair.switch()
    entry = pair.cell("x = 1")
    assert {"mark"} <= {name for each in entry["components"] for name in each["names"]}
    assert pair.cell("x = 2")["components"] != []
    assert {name for each in pair.entries[-1]["components"] for name in each["names"]} == {"x"}


def test_a_value_that_holds_the_namespace_lets_everything_be_touched_before_it_was_looked_into() -> None:
    pair = Pair()
    pair.cell("way = [globals()]\nother = [1]\nn = 0")
    capture = pair.standby.replica.capture
    work = capture.look_ahead()
    while capture.from_log:
        next(work)
    work.close()  # no time was left
    for unit in capture.units.values():
        unit.exposed = "" if unit.names == ("other",) else unit.exposed
    code = "way[0][chr(111) + 'ther'].append(2)".replace("'ther'", "chr(116) + chr(104) + chr(101) + chr(114)")
    pair.standby.run(code)
    assert "other" in written(pair.standby.replica.take_changes(code).changes)


def test_a_timer_that_a_loaded_value_started_is_seen() -> None:
    """A function of the notebook that stands in no variable: what it names is touched by every cell."""
    pair = Pair()
    pair.cell(
        "held, counter = [], [0]\n"
        "class Starter:\n"
        "    def __setstate__(self, state):\n"
        "        import sys\n"
        "        sys.held_by_a_library = lambda: counter.append(1)\n"
        "    def __getstate__(self): return 1\n"
        "starter = Starter()"
    )
    code = "import sys\nsys.held_by_a_library()"
    assert "counter" in written(captured(pair.standby, code))


def test_names_that_the_log_lost_are_not_taken_for_replicated() -> None:
    pair = Pair()
    pair.cell("a = [1]\ngone = (i for i in [])")
    pair.switch()
    pair.cell("gone = [2]")
    assert pair.on_standby("gone") == [2]


def test_entries_that_follow_keep_what_was_looked_into() -> None:
    pair = Pair()
    pair.cell("big = [[i] for i in range(100)]\nn = 0")
    capture = pair.standby.replica.capture
    for _ in capture.look_ahead():
        pass
    pair.cell("n += 1")
    assert capture.from_log
    assert captured(pair.standby, "n += 1").examined == 0
    pair.cell("big.append(n)")
    assert [unit.exposed for unit in capture.units.values()] != [""]
