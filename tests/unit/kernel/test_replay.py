"""Cells marked with `%%replay`: what is recorded, what a replica that takes over runs again, what that may change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nbos_kernel import guard
from nbos_kernel.lazy import BlobMissing
from nbos_kernel.lost import LostBuiltins
from nbos_kernel.replay import MOST_CELLS

from .pair import Pair, Side

LINE = "%%replay\nimport socket\nleft, right = socket.socketpair()"


@pytest.fixture
def pair() -> Pair:
    return Pair()


def recorded(pair: Pair) -> list[tuple[str, ...]]:
    return [record.names for record in pair.standby.replica.records.records]


def test_a_lost_variable_is_made_again_by_its_marked_cell(pair: Pair) -> None:
    pair.cell(LINE)
    assert "left" not in pair.standby.ns
    pair.switch()
    pair.cell("left.send(b'hello'); got = right.recv(9)")
    assert pair.executor.ns["got"] == b"hello"
    assert pair.told[-1].startswith("NBOS: replayed 1 cell for left, right in ")


def test_an_unmarked_cell_is_never_run_again(pair: Pair) -> None:
    pair.cell("runs = []")
    pair.cell("import sys; sys.modules['json'].ran = 1; gen = (i for i in range(3))")
    pair.switch()
    pair.cell("import json; del json.ran; x = 1")
    import json

    assert not hasattr(json, "ran")
    assert "gen" not in pair.executor.ns
    assert pair.told == []


def test_marked_cells_run_again_in_their_order(pair: Pair) -> None:
    pair.cell(LINE)
    pair.cell("%%replay\nsend = lambda data: left.send(data), left")
    pair.cell("x = 1")
    pair.switch()
    pair.cell("same = send[1] is left")
    assert pair.executor.ns["same"] is True
    assert pair.told[-1].startswith("NBOS: replayed 2 cells for left, right, send in ")


def test_a_marked_cell_whose_variables_are_there_does_not_run_again(pair: Pair) -> None:
    pair.cell("%%replay\nimport json\njson.ran = getattr(json, 'ran', 0) + 1\nx = 5")
    pair.switch()
    pair.cell("y = x; ran = json.ran; del json.ran")
    assert pair.executor.ns["ran"] == 1


def test_replicated_values_are_put_back(pair: Pair) -> None:
    pair.cell("%%replay\nn = 1\nout = ['made']\nglobals()['by'] = 2\ngen = (n for _ in [1])\nhelp_me = 1")
    pair.cell("n = 10; out.append('later'); by = 20; del help_me")
    pair.switch()
    pair.cell("first = next(gen)")
    ns = pair.executor.ns
    assert (ns["n"], ns["out"], ns["by"], ns["first"]) == (10, ["made", "later"], 20, 10)
    assert "help_me" not in ns


def test_changes_in_place_of_replicated_values_are_undone(pair: Pair) -> None:
    pair.cell("import numpy as np\nlog = []; alias = {'log': log}; array = np.zeros(500_000); shown = [0]")
    pair.cell("shown")
    pair.cell("class Tally:\n    def __init__(self): self.n = 0\n    def up(self): self.n += 1; hidden.append(self.n)")
    pair.cell("tally = Tally(); hidden = []; kept = [1]")
    pair.cell(
        "%%replay\nlog.append(1); array[7] += 1; tally.up(); shown.append(1)\n"
        "gen = (each for each in kept)\nkind = (each for each in [tally])"
    )
    pair.switch()
    pair.executor.takes_over({}, pair.told.append)
    ns = pair.executor.ns
    assert (ns["log"], ns["array"][7], ns["tally"].n, ns["hidden"], ns["shown"]) == ([1], 1, 1, [1], [0, 1])
    assert ns["alias"]["log"] is ns["log"]
    assert ns["_2"] is ns["shown"] is ns["_oh"][2]
    assert type(ns["tally"]) is ns["Tally"] is type(next(ns["kind"]))
    assert ns["gen"].gi_frame.f_locals[".0"].__reduce__()[1][0] is ns["kept"], "what did not change is the same object"


def test_what_is_too_large_for_a_copy_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.cell("import numpy as np; array = np.zeros(500_000); other = [1]")
    pair.cell("%%replay\narray[7] += 1; other\ngen = (i for i in [1])")
    pair.switch()
    monkeypatch.setattr(guard, "COPIES", 1000)
    pair.executor.takes_over({}, pair.told.append)
    assert pair.told[0].startswith("NBOS: a replay changed array in place")


def test_what_surrounds_the_namespace_is_put_back(pair: Pair) -> None:
    pair.cell("import random, os; random.seed(1)")
    pair.cell("%%replay\nos.environ['HERON'] = 'new'\nrandom.seed(5)\ngen = (i for i in range(3))")
    pair.cell("os.environ['HERON'] = 'late'; random.seed(9); expected = random.Random(9).random()")
    pair.switch()
    pair.cell("heron = os.environ.pop('HERON'); drawn = random.random()")
    assert pair.executor.ns["heron"] == "late"
    assert pair.executor.ns["drawn"] == pair.executor.ns["expected"]


def test_settings_of_ipython_are_put_back(pair: Pair) -> None:
    pair.cell("%%replay\n%precision 3\ngen = (i for i in range(3))")
    pair.cell("%precision 5")
    pair.switch()
    lines = pair.executor.replica.settings.lines
    pair.executor.takes_over({}, pair.told.append)
    assert "gen" in pair.executor.ns
    assert pair.executor.shell.display_formatter.formatters["text/plain"].float_precision == "5"
    assert pair.executor.replica.settings.lines == lines


def test_history_and_results_are_not_disturbed(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.cell("%%replay\nprint('loud')\ngen = (i for i in range(3))\n'shown'")
    pair.cell("40 + 2")
    pair.switch()
    shell, ns = pair.executor.shell, pair.executor.ns
    before = shell.execution_count, dict(ns["_oh"]), list(ns["_ih"]), ns["_"]
    capsys.readouterr()
    pair.executor.takes_over({}, lambda line: None)
    assert capsys.readouterr().out == ""
    assert "gen" in ns
    assert not isinstance(ns["__builtins__"], LostBuiltins), "nothing is lost here any more"
    assert (shell.execution_count, dict(ns["_oh"]), list(ns["_ih"]), ns["_"]) == before


def test_top_level_await_is_replayed(pair: Pair) -> None:
    pair.cell("import asyncio\nasync def numbers():\n    yield 4")
    pair.cell("%%replay\nawait asyncio.sleep(0)\nagen = numbers()\nfirst = await anext(agen)")
    pair.switch()
    pair.executor.takes_over({}, pair.told.append)
    assert "agen" in pair.executor.ns, pair.told


def test_instances_are_of_the_class_that_the_notebook_has(pair: Pair) -> None:
    pair.cell("%%replay\nclass Live:\n    def __init__(self): self.gen = (i for i in range(3))\nlive = Live()")
    pair.switch()
    pair.cell("same = type(live) is Live")
    assert pair.executor.ns["same"] is True


def test_a_replay_that_fails_leaves_the_name_lost_with_its_reason(pair: Pair) -> None:
    pair.cell("fail = False")
    pair.cell("%%replay\ngen = (i for i in range(3))\nif fail: raise OSError('no route')")
    pair.cell("%%replay\nother = (i for i in range(3))")
    pair.cell("fail = True")
    pair.switch()
    pair.cell("try:\n    gen\nexcept NameError as err:\n    said = str(err)")
    assert "failed when it ran again: OSError: no route" in pair.executor.ns["said"]
    assert "other" in pair.executor.ns
    assert any("gen not made again" in line and "no route" in line for line in pair.told)


def test_binding_a_name_that_a_replay_could_not_make_takes_it_out_of_effect(pair: Pair) -> None:
    pair.cell("fail = False")
    pair.cell("%%replay\nif fail: 1 / 0\ngen = (i for i in range(3))")
    pair.cell("fail = True")
    pair.switch()
    pair.cell("gen = (i for i in range(9))")
    assert pair.executor.replica.records.records == ()
    assert "'gen' is not replicated and would be gone" in pair.notices[0]


def test_a_failed_replay_is_not_tried_twice_in_one_takeover(pair: Pair) -> None:
    pair.cell("tries = []")
    count = "import json; json.tries = getattr(json, 'tries', 0) + 1\nif json.tries > 1: 1 / 0"
    pair.cell(f"%%replay\n{count}\ng = (i for i in [1])")
    pair.switch()
    pair.cell("x = 1")
    pair.cell("x = 2; tries = json.tries; del json.tries")
    assert pair.executor.ns["tries"] == 2


def test_a_second_failover_replays_again(pair: Pair) -> None:
    pair.cell(LINE)
    for n in range(3):
        pair.switch()
        pair.cell(f"left.send(b'{n}'); got = right.recv(9)")
        assert pair.executor.ns["got"] == b"%d" % n
        assert "left" not in pair.standby.ns, "what the executor before made is not the kernel's any more"


@pytest.mark.parametrize(
    "code", ["conn = 5", "del conn", "import socket\nconn = socket.socket()", "for conn in 'ab': pass"]
)
def test_whatever_binds_the_name_again_takes_the_record_out_of_effect(pair: Pair, code: str) -> None:
    pair.cell("%%replay\nimport socket\nconn = socket.socket()")
    pair.cell(code)
    assert all("conn" not in names for names in recorded(pair))


@pytest.mark.parametrize("code", ["conn.fileno()", "def f():\n    conn = 1", "other = conn", "conn2 = 5"])
def test_what_only_uses_the_name_leaves_the_record(pair: Pair, code: str) -> None:
    pair.cell("%%replay\nimport socket\nconn = socket.socket()")
    pair.cell(code)
    assert any("conn" in names for names in recorded(pair))


def test_a_name_that_is_no_longer_made_again_is_named(pair: Pair) -> None:
    pair.cell("%%replay\ngen = (i for i in [1])")
    assert pair.notices == ["NBOS: 'gen' is not replicated; its %%replay cell makes it anew after a failover"]
    pair.cell("gen = (i for i in [1])")
    assert "'gen' is not replicated and would be gone" in pair.notices[0]


def test_a_marked_cell_that_failed_is_not_recorded(pair: Pair) -> None:
    pair.cell("%%replay\ngen = (i for i in [1])\n1 / 0")
    assert recorded(pair) == []


def test_the_same_cell_again_takes_one_place(pair: Pair) -> None:
    pair.cell("%%replay\na = (i for i in [1])")
    pair.cell("%%replay\nb = (i for i in [1])")
    pair.cell("%%replay\na = (i for i in [1])")
    assert recorded(pair) == [("b",), ("a",)]


def test_what_only_its_first_run_made_stays_with_the_same_cell(pair: Pair) -> None:
    code = "%%replay\nglobals().setdefault('a', (i for i in [1]))\nb = (i for i in [1])"
    pair.cell(code)
    pair.cell(code)
    assert recorded(pair) == [("a", "b")]


def test_what_a_thread_binds_between_two_cells_counts_too(pair: Pair) -> None:
    pair.cell("%%replay\ngen = (i for i in [1])\nkept = (i for i in [1])")
    pair.executor.ns["gen"] = (i for i in [2])
    pair.cell("x = 1")
    assert recorded(pair) == [("kept",)]


def test_where_identity_proves_nothing_an_assignment_counts(pair: Pair) -> None:
    pair.cell("%%replay\nbox = [(i for i in [1])]")
    pair.cell("len(box)")
    assert recorded(pair) == [("box",)]
    pair.cell("box = box")
    assert recorded(pair) == []


def test_a_restart_forgets_every_record(pair: Pair) -> None:
    pair.cell("%%replay\na = (i for i in [1])")
    assert recorded(pair)
    pair.standby.replica.records.adopt(None, (), True)
    assert recorded(pair) == []


def test_too_many_cells_are_refused_with_the_limit(pair: Pair) -> None:
    for n in range(MOST_CELLS):
        pair.cell(f"%%replay\na{n} = (i for i in [1])")
    assert len(recorded(pair)) == MOST_CELLS
    pair.cell("%%replay\nmore = (i for i in [1])")
    assert "more" not in pair.executor.ns
    pair.cell("%%replay\na0 = (i for i in [1])")
    pair.cell("del a1")
    pair.cell("%%replay\nmore = (i for i in [1])")
    assert ("more",) in recorded(pair)


def test_a_long_cell_is_refused(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.cell("%%replay\ntext = '" + "x" * 60_000 + "'")
    assert "keeps 49152" in capsys.readouterr().err
    assert "text" not in pair.executor.ns


def test_other_magics_stand_beside_it(pair: Pair) -> None:
    pair.cell("%%gpu 1\n%%replay\n%%time\na = (i for i in [1])", {"gpus": 1})
    pair.cell("%%replay\n%%cpu\nb = (i for i in [1])")
    assert recorded(pair) == [("a",), ("b",)]


def test_misuse_says_what_is_wrong(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.cell("%%replay now\na = 1")
    assert "%%replay takes no arguments, got 'now'" in capsys.readouterr().err
    pair.cell("%%time\n%%replay\na = 1")
    assert "must be the first line" in capsys.readouterr().err
    assert "a" not in pair.executor.ns


def test_a_replay_that_needs_a_gpu_waits_for_a_cell_that_holds_one(pair: Pair) -> None:
    pair.cell("%%gpu 1\n%%replay\ngraph = (i for i in [1])", {"gpus": 1})
    pair.cell("%%replay\nstream = (graph for _ in [1])")
    pair.switch()
    pair.cell("x = 1")
    assert not pair.executor.ns.keys() & {"graph", "stream"}
    assert "asks for a GPU" in pair.executor.replica.lost["graph"]
    pair.cell("y = 1", {"gpus": 1})
    assert pair.executor.ns.keys() >= {"graph", "stream"}


def test_nothing_is_replayed_after_cells_that_ended_with_their_replica(pair: Pair) -> None:
    pair.cell("%%replay\ngen = (i for i in [1])")
    pair.switch()
    for _ in range(2):
        pair.executor.replica.rerun.applied(abandoned=True)
    pair.cell("x = 1")
    assert "gen" not in pair.executor.ns
    assert "was not run again: the last 2 cells ended with their replica" in pair.executor.replica.lost["gen"]


def test_an_interrupt_leaves_the_rest_lost(pair: Pair) -> None:
    pair.cell("%%replay\na = (i for i in [1])")
    pair.cell("late = False")
    pair.cell("%%replay\nif late: raise KeyboardInterrupt\nb = (i for i in [1])")
    pair.cell("%%replay\nc = (i for i in [1])")
    pair.cell("late = True")
    pair.switch()
    with pytest.raises(KeyboardInterrupt):
        pair.executor.takes_over({}, pair.told.append)
    assert "a" in pair.executor.ns
    assert not pair.executor.ns.keys() & {"b", "c"}
    assert "interrupted" in pair.executor.replica.lost["b"]
    assert "interrupted" in pair.executor.replica.lost["c"]


def test_the_way_out_is_named_once(pair: Pair) -> None:
    pair.cell("gen = (i for i in [1])")
    assert "%%replay" in pair.notices[-1]
    pair.cell("gen2 = (i for i in [1])")
    assert "%%replay" not in " ".join(pair.notices)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_replay_sees_what_a_lazy_standby_left_in_the_store(foreseen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(100_000)
    pair.cell("big = bytearray(500_000)")
    pair.cell("%%replay\nsize = len(big)\ngen = (i for i in [size])")
    pair.switch()
    assert "big" not in pair.executor.ns
    if not foreseen:  # then the lookup itself loads it, while the marked cell runs
        monkeypatch.setattr(pair.executor.replica.lazy, "before", lambda code: None)
    pair.executor.takes_over({}, pair.told.append)
    assert list(pair.executor.ns["gen"]) == [500_000]
    assert pair.executor.eval("len(big)") == 500_000


def test_what_the_store_cannot_give_now_leaves_the_name_lost_with_its_reason() -> None:
    pair = Pair(100_000)
    pair.cell("big = bytearray(500_000)")
    pair.cell("%%replay\nsize = len(big)\ngen = (i for i in [1])")
    pair.switch()
    Refusing(pair.executor)
    pair.executor.takes_over({}, pair.told.append)
    assert "gen" not in pair.executor.ns
    assert "the store does not answer" in pair.executor.replica.lost["gen"]


def test_a_value_that_only_cannot_be_fetched_now_is_not_made_up(pair: Pair) -> None:
    pair.standby.replica._read = Refusing(pair.standby)
    pair.cell("%%replay\nbig = bytearray(500_000)\ngen = (i for i in [1])")
    assert {"big", "gen"} <= pair.standby.replica.lost.keys()
    pair.switch()
    pair.executor.takes_over({}, pair.told.append)
    assert "gen" in pair.executor.ns
    assert "big" not in pair.executor.ns


class Refusing:
    """A store that does not answer now."""

    def __init__(self, side: Side) -> None:
        side.replica.lazy._read = self

    async def __call__(self, hashes: Sequence[str], target: memoryview, chunk: int) -> int:
        raise BlobMissing("its data: the store does not answer", again=True)
