"""A replica that leaves large values in the store shows what one that holds everything shows, and fetches only what
code looks up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from nbos_kernel import binding, lazy, lazyshell
from nbos_kernel.capture import parked, touch, unloaded
from nbos_kernel.lazy import BlobMissing, NotLoadedError
from nbos_kernel.lost import NotReplicatedError

from .pair import Pair, Side

FROM = 100_000
"""Bytes from which components stay unloaded here."""

BIG = "np.full(50_000, {}.0)"


class Reads:
    """Records which blobs a side reads, and can refuse them."""

    def __init__(self, side: Side) -> None:
        self.fetched: list[str] = []
        self.refuse: Exception | None = None
        self._read = side._read
        side.replica.lazy._read = self

    async def __call__(self, hashes: Sequence[str], target: memoryview, chunk: int) -> int:
        self.fetched += hashes
        if self.refuse is not None:
            raise self.refuse
        return await self._read(hashes, target, chunk)


@pytest.fixture
def pair() -> Pair:
    return Pair(FROM)


@pytest.fixture
def reads(pair: Pair) -> Reads:
    """Of the replica that is the standby first."""
    return Reads(pair.standby)


def held(side: Side) -> set[str]:
    return {name for name in side.ns if len(name) == 1 and name != "_"}


def blobs_of(entry: dict[str, Any]) -> set[str]:
    found = (frame.get("blobs", ()) for each in entry["components"] for frame in each["frames"])
    return {digest for some in found for digest in some}


def test_only_what_a_cell_names_is_fetched(pair: Pair, reads: Reads) -> None:
    pair.cell("import numpy as np; s = [1, 2]")
    a = pair.cell(f"a = {BIG.format(1)}")
    b = pair.cell(f"b = {BIG.format(2)}")
    assert held(pair.standby) == {"s"}
    assert reads.fetched == []
    pair.switch()
    entry = pair.cell("t = float(a.sum())")
    assert ["a"] not in [each["names"] for each in entry["components"]]
    assert pair.executor.eval("t") == 50_000.0
    assert held(pair.executor) == {"s", "a", "t"}
    assert {*reads.fetched} == blobs_of(a)
    assert blobs_of(b).isdisjoint(reads.fetched)


def test_a_function_brings_what_it_names_and_so_do_the_functions_it_calls(pair: Pair) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}; b = {BIG.format(2)}; c = {BIG.format(3)}")
    pair.cell("def f(): return g() + 1\ndef g(): return b[0]\nh = [f]")
    pair.switch()
    pair.cell("x = h[0]()")
    assert pair.executor.eval("x") == 3.0
    assert held(pair.executor) & {*"abc"} == {"b"}


def test_a_function_inside_an_unloaded_value_brings_what_it_names(pair: Pair) -> None:
    pair.cell(f"import numpy as np; b = {BIG.format(2)}")
    pair.cell(f"class K:\n    def __init__(self): self.own = {BIG.format(1)}\n    def run(self): return b[0]\nk = K()")
    assert {"k", "K", "b"} <= {*pair.standby.replica.lazy.table}
    pair.switch()
    pair.cell("x = k.run()")
    assert pair.executor.eval("x") == 2.0
    assert "b" in held(pair.executor)


def test_a_lookup_that_nothing_foresaw_loads(pair: Pair) -> None:
    """A callback, a thread: code that runs without a cell that names it."""
    pair.cell(f"import numpy as np; a = {BIG.format(7)}\ndef f(): return a[0]")
    pair.switch()
    assert pair.executor.eval("a[1]") == 7.0
    pair.cell("x = 1")
    pair.switch()
    pair.cell("a = a + 1")
    pair.switch()
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(pair.executor.ns["f"]()))
    thread.start()
    thread.join(10)
    assert found == [8.0]


def test_what_nobody_touched_stays_in_the_log_and_the_next_replica_has_it(pair: Pair, reads: Reads) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}; b = {BIG.format(2)}")
    pair.switch()
    entry = pair.cell("x = 1")
    assert entry["deleted"] == []
    assert [each["names"] for each in entry["components"] if "a" in each["names"] or "b" in each["names"]] == []
    pair.cell("b[0] = 5")
    pair.switch()
    pair.cell("y = (a[0], b[0])")
    assert pair.executor.eval("y") == (1.0, 5.0)
    assert len(reads.fetched) == 1


def test_a_former_executor_that_another_changed_a_value_of_lets_go_of_it(pair: Pair) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}; b = {BIG.format(2)}")
    pair.switch()
    pair.cell("a[0] = 9")
    assert held(pair.standby) == {"b"}
    assert "a" in pair.standby.replica.lazy.table
    pair.switch()
    assert pair.executor.eval("float(a[0])") == 9.0


def test_assigning_deleting_and_what_shares(pair: Pair) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}; b = a; c = {BIG.format(2)}; d = {BIG.format(3)}")
    pair.switch()
    entry = pair.cell("a = 1; del c")
    assert entry["deleted"] == ["c"]
    assert pair.executor.eval("a") == 1
    pair.switch()
    pair.cell("x = 'c' in globals()")
    assert (pair.executor.eval("x"), pair.executor.eval("a"), pair.executor.eval("float(b[0])")) == (False, 1, 1.0)
    with pytest.raises(NameError):
        pair.executor.eval("c")
    assert pair.executor.eval("float(d[0])") == 3.0


def test_a_name_bound_behind_our_back_is_not_overwritten(pair: Pair) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}; b = a")
    pair.switch()
    pair.executor.ns["a"] = "mine"  # a thread did it
    assert pair.executor.eval("float(b[0])") == 1.0
    assert pair.executor.eval("a") == "mine"
    entry = pair.cell("x = 1")
    assert ["a"] in [each["names"] for each in entry["components"]]
    assert pair.standby.eval("a") == "mine"


def test_a_name_bound_and_deleted_behind_our_back_does_not_come_back(pair: Pair) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}")
    pair.switch()
    pair.executor.ns["a"] = "mine"
    pair.cell("x = 1")
    del pair.executor.ns["a"]
    with pytest.raises(NameError):
        pair.executor.eval("a")
    assert pair.cell("x = 2")["deleted"] == ["a"]


@pytest.mark.parametrize(
    "code", ["x = f()", "x = sorted(globals())", "x = dir()", "x = eval('a' + '')", "%whos", "reset -f"]
)
def test_code_that_reaches_names_without_naming_them_loads_everything(pair: Pair, code: str) -> None:
    pair.cell("def f(): return sorted(globals())")
    pair.cell(f"import numpy as np; a = {BIG.format(1)}; b = {BIG.format(2)}")
    pair.switch()
    pair.cell(code)
    assert not pair.executor.replica.lazy.table
    if "reset" not in code:
        assert {"a", "b"} <= held(pair.executor)


@pytest.mark.parametrize(
    "code",
    [
        "x = dir(1)",
        "import gc; gc.collect()",
        "x = In[-1]",
        "x = open",
        "%who_ls",
        "%who",
        "x = 1  # push the code to the output dir, inspect it, reset",
        "import importlib, inspect; x = [importlib.reload, inspect.getdoc]",
        "class E:\n    def reset(self): pass\nE().reset()",
        "x = long",
    ],
)
def test_code_that_does_not_loads_nothing(pair: Pair, code: str) -> None:
    pair.cell(f"long = 'globals, locals'; import numpy as np; a = {BIG.format(1)}; b = {BIG.format(2)}")
    pair.switch()
    pair.cell(code)
    assert not {"a", "b"} & held(pair.executor)


def test_who_and_completion_name_what_is_not_loaded(pair: Pair, reads: Reads) -> None:
    pair.cell(f"import numpy as np; alpha = {BIG.format(1)}; beta = {BIG.format(2)}; small = 1")
    pair.switch()
    pair.cell("names = %who_ls")
    assert {"alpha", "beta", "small"} <= {*pair.executor.eval("names")}
    table = pair.executor.replica.lazy
    empty = {"matches": [], "cursor_start": 6, "cursor_end": 6, "metadata": {"_jupyter_types_experimental": []}}
    reply = lazyshell.completed(empty, "x = al", 6, table)
    assert (reply["matches"], reply["cursor_start"]) == (["alpha"], 4)
    for other in ("x.al", "'al", "%al", "import al"):
        untouched = {"matches": [], "cursor_start": 0, "cursor_end": 0, "metadata": {}}
        assert lazyshell.completed(untouched, other, len(other), table)["matches"] == []
    assert reads.fetched == []
    assert table.peek("alpha.s")
    assert "alpha" in pair.executor.ns
    types = pair.executor.shell.run_line_magic("who_ls", "ndarray")
    assert types == ["alpha", "beta"]


def test_inspection_does_not_fetch_what_takes_long(pair: Pair, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.cell(f"import numpy as np; alpha = {BIG.format(1)}")
    pair.switch()
    monkeypatch.setattr(lazy, "PEEK", 1000)
    table = pair.executor.replica.lazy
    assert not table.peek("alpha.sum")
    assert reads.fetched == []
    said = lazyshell.not_inspected("alpha.sum", table)
    assert said is not None
    assert "alpha: 390.8 KiB, not loaded" in said["data"]["text/plain"]


def test_results_move_on_and_out_has_them(pair: Pair) -> None:
    pair.cell("import numpy as np")
    pair.cell(BIG.format(1))
    pair.switch()
    pair.cell("'next'")
    assert pair.executor.eval("_") == "next"
    assert pair.executor.eval("float(__[0])") == 1.0
    pair.switch()
    pair.cell("x = float(Out[2][0])")
    assert pair.executor.eval("x") == 1.0


def test_a_text_variable_may_hold_names(pair: Pair) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}; q = 'select * from a'")
    pair.switch()
    pair.cell("len(q)")
    assert "a" in held(pair.executor)


def test_main_under_another_name_opens_the_namespace(pair: Pair) -> None:
    pair.cell(f"import numpy as np, sys; a = {BIG.format(1)}; m = [sys.modules[__name__]][0]")
    pair.executor.ns["m"] = pair.executor.shell.user_module
    pair.cell("box = []")
    pair.switch()
    assert touch.reflective_value(pair.executor.ns["m"])
    pair.cell("getattr(m, 'b' + 'ox').append(1)")
    assert pair.standby.eval("box") == [1]


def test_pickles_find_the_notebooks_classes(pair: Pair) -> None:
    pair.cell(f"import numpy as np, pickle\nclass K: table = {BIG.format(1)}")
    assert "K" in pair.standby.replica.lazy.table
    pair.switch()
    assert pair.executor.shell.user_module.K.table[0] == 1.0
    assert not hasattr(pair.executor.shell.user_module, "nothing")


def test_a_variable_with_the_name_of_a_builtin_is_loaded_at_once(pair: Pair) -> None:
    pair.cell(f"import numpy as np; sum = {BIG.format(4)}")
    assert pair.standby.eval("float(sum[0])") == 4.0
    assert not pair.standby.replica.lazy.table


def test_a_missing_blob_costs_its_variables_only_and_is_named(pair: Pair, reads: Reads) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}; b = {BIG.format(2)}")
    reads.refuse = BlobMissing("its data: no such blob")
    pair.switch()
    pair.cell("try: x = a\nexcept NameError: x = 2")
    assert pair.executor.replica.lost == {"a": "cannot be loaded on this replica: its data: no such blob"}
    with pytest.raises(NotReplicatedError, match="no such blob"):
        pair.executor.eval("a")
    reads.refuse = None
    assert pair.executor.eval("float(b[0])") == 2.0
    assert pair.executor.eval("x") == 2


def test_a_store_that_is_away_loses_nothing(pair: Pair, reads: Reads) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}")
    pair.switch()
    reads.refuse = BlobMissing("its data: the store does not answer", again=True)
    with pytest.raises(NotLoadedError, match=r"a: not loaded .* the store does not answer; run the cell again"):
        pair.executor.run("x = a[0]")
    with pytest.raises(NotLoadedError):
        pair.executor.eval("a")
    assert pair.executor.replica.lost == {}
    reads.refuse = None
    entry = pair.cell("x = float(a[0])")
    assert (pair.executor.eval("x"), entry["lost"], entry["deleted"]) == (1.0, {}, [])


def test_an_interrupted_load_can_be_repeated(pair: Pair, reads: Reads) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}")
    pair.switch()
    reads.refuse = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        pair.executor.run("x = a[0]")
    reads.refuse = None
    assert pair.executor.eval("float(a[0])") == 1.0


def test_a_value_that_lies_is_found_out_when_it_is_loaded(pair: Pair) -> None:
    lying = "class K:\n    def __init__(self): self.x, self.big = 1, {}\n"
    lying += "    def __getstate__(self): return {{'big': self.big}}\nk = K()"
    pair.cell("import numpy as np\n" + lying.format(BIG.format(1)))
    assert pair.standby.replica.lost == {}
    pair.switch()
    with pytest.raises(NotReplicatedError, match="comes back changed"):
        pair.executor.eval("k")


def test_the_user_is_told_what_a_cell_waits_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.cell(f"import numpy as np; alpha = {BIG.format(1)}; beta = {BIG.format(2)}")
    pair.switch()
    monkeypatch.setattr(lazy, "LOUD", 1000)
    told: list[str] = []
    pair.executor.replica.lazy.tell = told.append
    pair.cell("x = alpha[0] + beta[0]")
    assert told == ["NBOS: loading 781.6 KiB of alpha, beta, which this replica left in the store"]


def test_a_reset_forgets_what_is_not_loaded(pair: Pair) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}")
    side = pair.standby
    side.replica.arrived({"type": "entry", "entry": {"n": 2, "kind": "reset"}}, b"")
    asyncio.run(side.replica.catch_up(lambda n, lost: None))
    assert not side.replica.lazy.table
    with pytest.raises(NameError):
        side.eval("a")


def test_rows_of_what_is_not_loaded(pair: Pair) -> None:
    pair.cell(f"import numpy as np; a = {BIG.format(1)}; b = a")
    (row,) = pair.standby.replica.lazy.rows()
    assert (row["names"], row["state"]) == (["a", "b"], "not loaded")
    assert row["size"] >= 400_000


def test_needed_follows_words_functions_and_texts() -> None:
    table = {"a", "b", "c"}
    namespace: dict[str, Any] = {"f": object(), "q": "from c", "g": globals, "s": object()}
    said = {"f": ["b", "g2"], "s": []}
    assert unloaded.needed({"a"}, table, namespace, said.get) == {"a"}
    assert unloaded.needed({"f"}, table, namespace, said.get) == {"b"}
    assert unloaded.needed({"q"}, table, namespace, said.get) == {"c"}
    assert unloaded.needed({"g"}, table, namespace, said.get) == table
    assert unloaded.needed({"s"}, table, namespace, lambda name: None) == table
    assert unloaded.needed({"s", "other"}, table, namespace, said.get) == set()


class TestCuda:
    """A tensor of a device is loaded within a cell that holds a GPU. Here a host copy plays the device."""

    @pytest.fixture(autouse=True)
    def nothing_waits(self) -> Iterator[None]:
        pytest.importorskip("torch")
        yield
        binding._current = None
        parked._homes.clear()
        parked._waiting.clear()

    def test_it_waits_in_host_memory_and_moves_when_the_cell_holds_a_gpu(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parked, "home_of", lambda storage: "cuda:0")
        pair.cell("import torch; t = torch.arange(50_000.0); v = t[:2]")
        pair.switch()
        moved: list[str] = []
        monkeypatch.setattr(parked, "_to_device", lambda storage, home: moved.append(home) or storage.clone())
        share = binding.Share("GPU-1", 0, "any", (1,), 1, True, simulated=False)
        binding._current = binding.Grant("g", "host", 2, (share,))
        pair.executor.run("x = float(t[3]); t[0] = 8.0; y = float(v[0])")
        assert moved == ["cuda:0"]
        assert (pair.executor.eval("x"), pair.executor.eval("y")) == (3.0, 8.0)
        assert not parked.anything()
