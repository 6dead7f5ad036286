"""What is kept of cells' outputs: whatever they print, clear, replace and end, what is kept is the end of it, in order,
nothing twice, within its bounds, and exactly what is missing is said; also across routers that come and go.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbos_cluster.kept import CELL, OVERHEAD, PIECE, Bounds, Cell, Kept, note
from nbos_provisioner.keeping import shown


def stream(text: str, name: str = "stdout") -> dict[str, str]:
    return {"name": name, "text": text}


def atoms(messages: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What an output area shows, smallest parts first to last: each printed part ends with a semicolon."""
    parts: list[str] = []
    for kind, content in messages:
        if kind == "stream":
            parts += [f"{content['name']} {part}" for part in content["text"].split(";")[:-1]]
        else:
            parts.append(str(content["data"]["text/plain"]))
    return parts


class KeptMachine(RuleBasedStateMachine):
    """`truth`: what each cell's output area would show to a client that was there all the time."""

    @initialize(size=st.integers(3 * CELL, 30_000), messages=st.integers(2, 30))
    def start(self, size: int, messages: int) -> None:
        self.bounds = Bounds(size, messages)
        self.kept = Kept(self.bounds)
        self.truth: dict[str, list[str]] = {}
        self.clearing: set[str] = set()
        self.count = 0

    def running(self) -> list[str]:
        return [key for key, cell in self.kept.cells.items() if not cell.ended]

    @rule()
    def begin(self) -> None:
        self.count += 1
        key = f"m{self.count}"
        self.truth[key] = []
        self.kept.begin({"msg_id": key, "session": "s"}, cell=f"c{self.count % 4}", code="x")

    def _add(self, data: st.DataObject, kind: str, content: dict[str, Any], shows: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.kept.cells)))
        if kind != "update_display_data" and key in self.clearing:
            self.clearing.discard(key)
            self.truth[key].clear()
        self.kept.add(key, kind, content, len(json.dumps(content)))
        self.truth[key].append(shows)

    @precondition(lambda self: self.kept.cells)
    @rule(data=st.data(), name=st.sampled_from(["stdout", "stderr"]), length=st.sampled_from([1, 100, PIECE, 20_000]))
    def write(self, data: st.DataObject, name: str, length: int) -> None:
        self.count += 1
        text = f"{self.count}{'.' * length}"
        self._add(data, "stream", stream(f"{text};", name), f"{name} {text}")

    @precondition(lambda self: self.kept.cells)
    @rule(data=st.data(), identity=st.sampled_from(["", "a"]))
    def display(self, data: st.DataObject, identity: str) -> None:
        self.count += 1
        content: dict[str, Any] = {"data": {"text/plain": f"{identity}#{self.count}"}, "metadata": {}}
        content["transient"] = {"display_id": identity} if identity else {}
        self._add(data, "display_data", content, f"{identity}#{self.count}")

    @precondition(lambda self: self.kept.cells)
    @rule(data=st.data(), length=st.sampled_from([1, 5000]))
    def update(self, data: st.DataObject, length: int) -> None:
        self.count += 1
        new = f"a#{self.count}{'.' * length}"
        content = {"data": {"text/plain": new}, "metadata": {}, "transient": {"display_id": "a"}}
        key = data.draw(st.sampled_from(sorted(self.kept.cells)))
        for parts in self.truth.values():
            parts[:] = [new if part.startswith("a#") else part for part in parts]
        self.kept.add(key, "update_display_data", content, len(json.dumps(content)))

    @precondition(lambda self: self.kept.cells)
    @rule(data=st.data(), wait=st.booleans())
    def clear(self, data: st.DataObject, wait: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.kept.cells)))
        self.kept.add(key, "clear_output", {"wait": wait}, 20)
        if wait:
            self.clearing.add(key)
        else:
            self.clearing.discard(key)
            self.truth[key].clear()

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.running()))
        self.kept.replied(key, {"status": "ok"})
        assert self.kept.ended(key)
        assert not self.kept.ended(key), "an end is told once"

    @precondition(lambda self: self.kept.cells)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.kept.forget([data.draw(st.sampled_from(sorted(self.kept.cells)))])

    @rule(twice=st.booleans())
    def another_router(self, twice: bool) -> None:
        """All of it passes to another one, as JSON; a word that is heard twice changes nothing."""
        dumped = json.loads(json.dumps(self.kept.dump()))
        self.kept = Kept(self.bounds)
        for _ in range(1 + twice):
            self.kept.load(json.loads(json.dumps(dumped)))

    @invariant()
    def what_is_kept_is_the_end(self) -> None:
        if not hasattr(self, "kept"):
            return
        for key, cell in self.kept.cells.items():
            messages = [(kind, content) for kind, content in shown(cell) if kind != "clear_output"]
            parts, truth = atoms(messages), self.truth[key]
            assert parts == truth[len(truth) - len(parts) :]
            assert len(parts) + cell.missing[0] == len(truth), "what is missing is told exactly"
            assert bool(note(cell, self.bounds)) == (len(parts) < len(truth))
            assert cell.clearing == (key in self.clearing)

    @invariant()
    def within_bounds(self) -> None:
        if not hasattr(self, "kept"):
            return
        cells = self.kept.cells.values()
        held = sum(CELL + len(cell.code) + sum(piece.size for piece in cell.pieces) for cell in cells)
        assert held == self.kept.size
        assert sum(len(cell.pieces) for cell in cells) == self.kept.messages <= self.bounds.messages
        running = [cell for cell in cells if not cell.ended]
        assert held <= max(self.bounds.size, sum(CELL + len(cell.code) for cell in running))


KeptMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestKept = KeptMachine.TestCase


def test_a_cell_that_prints_for_ever_holds_no_more_than_the_bound() -> None:
    kept = Kept(Bounds(1_000_000, 10_000))
    kept.begin({"msg_id": "m", "session": "s"}, code="while True: print()")
    for i in range(200_000):
        kept.add("m", "stream", stream(f"line {i:>40}\n"), 70)
    assert kept.size <= 1_000_000
    [cell] = kept.cells.values()
    text = "".join(content["text"] for _, content in shown(cell))
    assert len(text) > 500_000, "the bound is used"
    assert text.endswith("199999\n")
    missing = 200_000 - len(text.splitlines())
    assert cell.missing[0] == missing
    assert f"{missing:,} earlier messages" in note(cell, kept.bounds)


def test_one_message_larger_than_the_bound_is_named_as_missing() -> None:
    kept = Kept(Bounds(100_000, 10))
    kept.begin({"msg_id": "m", "session": "s"})
    kept.add("m", "display_data", {"data": {"image/png": "x" * 200_000}}, 200_000)
    cell = kept.cells["m"]
    assert (list(cell.pieces), cell.missing) == ([], [1, 200_000])


def test_nothing_is_kept_where_that_is_switched_off() -> None:
    kept = Kept(Bounds(0, 0))
    kept.begin({"msg_id": "m", "session": "s"})
    assert not kept.cells


def test_a_cell_run_again_by_its_user_replaces_what_was_kept_of_it() -> None:
    kept = Kept()
    for key in ("one", "two"):
        kept.begin({"msg_id": key, "session": "s"}, cell="c")
        kept.add(key, "stream", stream(key), 10)
        kept.ended(key)
    assert list(kept.cells) == ["two"]
    assert isinstance(kept.cells["two"], Cell)
    assert kept.size == CELL + OVERHEAD + 10
