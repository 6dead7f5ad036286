"""`%nbos state`: what it says of each variable, in text, HTML and as a dict."""

from __future__ import annotations

import json
from typing import Any

from nbos_kernel import stateview
from nbos_kernel.capture import names
from nbos_kernel.progress import Progress
from nbos_kernel.stateview import Sources, as_html, as_text, kind_of, survey

from .pair import Pair, Side

STATUS = {
    "replica": 0,
    "last": 5,
    "members": [
        {"index": 0, "host": "a", "state": "ready", "applied": 5},
        {"index": 1, "host": "b", "state": "ready", "applied": 5},
        {"index": 2, "host": "c", "state": "ready", "applied": 3},
    ],
}


def look(side: Side, **fields: Any) -> dict[str, Any]:
    replica, shell = side.replica, side.shell
    return survey(
        Sources(
            capture=replica.capture,
            ledger=replica.ledger,
            namespace=shell.user_ns,
            variables=lambda: names.user_variables(shell.user_ns, shell.user_ns_hidden),
            **{"status": STATUS, **fields},
        )
    )


def row(state: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [row for row in state["components"] if name in row["names"]]
    return found


def note(side: Side, n: int, fresh: dict[str, int]) -> None:
    """What the reporter does for an execution of this replica."""
    ledger = side.replica.ledger
    ledger.began(n, 10.0)
    ledger.captured(n, [(((name,), 2 * count), count) for name, count in fresh.items()], (), 10.5)
    ledger.committed(n, 11.0)


def test_size_component_type_and_state_of_each_variable() -> None:
    pair = Pair()
    pair.cell(
        "import numpy as np\na = np.zeros(500_000)\nview = a[1:]\nt = 'x'\ngen = (i for i in [])\nlonely = [1, 2]"
    )
    state = look(pair.executor)
    array = row(state, "a")
    assert array["names"] == ["a", "view"]
    assert array["types"] == {"a": "ndarray 500000 float64", "view": "ndarray 499999 float64"}
    assert array["size"] >= 4_000_000
    assert row(state, "lonely")["types"]["lonely"] == "list, 2"
    assert row(state, "gen")["state"] == "not replicated"
    assert "generator" in row(state, "gen")["reason"]
    assert row(state, "t")["state"] == "replicated"
    assert state["components"][0] is array  # the largest first
    assert json.loads(json.dumps(state))["size"] == state["size"]


def test_what_this_cell_has_bound_so_far_is_pending() -> None:
    pair = Pair()
    pair.cell("old = [1]; same = [2]; number = 3")
    pair.executor.run("new = [4]; old = [5]; number = 6")
    state = look(pair.executor)
    pending = {name for each in state["components"] if each["state"] == "pending" for name in each["names"]}
    assert pending == {"new", "old", "number"}
    assert row(state, "same")["state"] == "replicated"
    assert "written when it ends" in row(state, "new")["reason"]


def test_what_a_standby_has_not_applied_is_pending_with_its_number() -> None:
    pair = Pair()
    pair.cell("early = [1]\nlate = [2]")
    note(pair.executor, 2, {"early": 10})
    note(pair.executor, 5, {"late": 10})
    state = look(pair.executor)
    assert row(state, "late")["state"] == "pending"
    assert row(state, "late")["reason"] == "in the log as entry 5; not heard of it yet from replica 2 (told of 3)"
    assert row(state, "late")["standbys"] == [1]
    assert row(state, "early")["standbys"] == [1, 2]
    assert row(state, "early")["state"] == "replicated"
    text = as_text(state)
    assert "standby: replica 2 on c is ready, 2 entries behind" in text


def test_a_replication_under_way_is_seen_from_a_subshell() -> None:
    pair = Pair()
    pair.cell("df = [1]\nquiet = [2]")
    progress = Progress(2, 100.0)
    progress.captured([(("df",), 1000)], 100.0)
    progress.sending(1000)
    progress.stored(500)
    state = look(pair.executor, progress=progress, now=101.0)
    assert row(state, "df")["state"] == "pending"
    assert "50 %" in row(state, "df")["reason"]
    assert "now: replicating 1000 B of df: 50 %" in as_text(state)
    assert row(state, "quiet")["state"] == "replicated"


def test_a_new_executor_knows_what_it_applied() -> None:
    pair = Pair()
    pair.cell("import numpy as np\na = np.zeros(1000)\nb = [a]\nsmall = 1")
    pair.cell("later = [1]")
    state = look(pair.standby)
    assert row(state, "a")["names"] == ["a", "b"]
    assert row(state, "a")["size"] > 8000
    assert (row(state, "a")["entry"], row(state, "later")["entry"]) == (1, 2)
    assert {name for each in state["components"] for name in each["names"]} >= {"a", "b", "small", "later", "np"}
    assert "this replica has run no cell yet" in as_text(state)
    pair.cell("del later")
    assert not any("later" in each["names"] for each in look(pair.standby)["components"])


def test_what_the_last_cell_wrote_and_when_it_was_safe() -> None:
    pair = Pair()
    pair.cell("w = [1]")
    note(pair.executor, 5, {"w": 3 << 20, "%random": 100})
    pair.executor.replica.ledger.last.chunks = 2
    pair.executor.replica.ledger.standby(1, 4, 11.5)
    pair.executor.replica.ledger.standby(1, 5, 12.0)
    pair.executor.replica.ledger.standby(1, 6, 99.0)
    state = look(pair.executor, room={"store": {"where": "the store", "free": 1 << 30}, "standbys": []})
    text = as_text(state)
    assert "the last cell (entry 5) wrote 3.0 MiB of 6.0 MiB in 2 chunks: w 3.0 MiB" in text
    assert "after its end: captured 0.50 s, safe 1.00 s, on replica 1 at most 2.00 s" in text
    assert "the store: 1.00 GiB left" in text
    note(pair.executor, 6, {"%random": 100})
    after = as_text(look(pair.executor))
    assert "the last cell (entry 6) wrote no variable" in after
    assert "the last that did (entry 5) wrote 3.0 MiB" in after


def test_plain_values_stand_with_their_own_size_and_small_ones_share_a_row() -> None:
    pair = Pair()
    pair.cell("text = 'x' * 5000\na = 1\nb = 2.5\nc = 'y'")
    note(pair.executor, 1, {})
    pair.executor.replica.ledger.wrote(1, [(("text",), 5020), (("a",), 10), (("b",), 20), (("c",), 30)], ())
    state = look(pair.executor)
    assert (row(state, "text")["names"], row(state, "text")["size"]) == (["text"], 5020)
    assert row(state, "text")["types"] == {"text": "str, 5,000"}
    assert row(state, "a")["names"] == ["a"]
    text = as_text(state)
    assert "4.9 KiB  replicated  text  [str, 5,000]" in text
    assert "60 B  replicated  " in text
    (line,) = [line for line in text.splitlines() if "float" in line]
    assert {"a", "b", "c"} <= set(line.replace(",", "").split())


def test_rows_of_others_and_replayed_names() -> None:
    pair = Pair()
    pair.cell("gen = (i for i in [])\nother = (i for i in [])")
    more = [{"names": ["far"], "size": 77, "state": "not loaded", "reason": "in the store until something looks it up"}]
    state = look(pair.executor, more=more, replayed={"gen"})
    assert (row(state, "far")["state"], row(state, "gen")["state"]) == ("not loaded", "replayed")
    assert row(state, "other")["state"] == "not replicated"


def test_html_is_escaped_and_long_lists_are_cut() -> None:
    pair = Pair()
    pair.cell("kind = type('<script>', (), {})\nx = kind()\ng = (i for i in [])")
    state = look(pair.executor, status={**STATUS, "error": "<b>away</b>"})
    state["components"] = [*state["components"], *[{**row(state, "x"), "size": 2048} for _ in range(300)]]
    html = as_html(state)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;away" in html
    assert html.count("<tr>") <= stateview.SHOWN + 2
    assert "smaller components are not shown" in html


class Loud:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was looked at")

    def __len__(self) -> int:
        raise AssertionError("it was counted")


class Longer(list[int], Loud):
    pass


def test_looking_runs_no_code_of_the_user() -> None:
    assert (kind_of(Loud()), kind_of(Longer()), kind_of(Loud)) == ("Loud", "Longer", "type")
