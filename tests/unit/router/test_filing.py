"""What is kept of a cell, as a notebook's file holds it; and the options' bounds."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import nbformat
import pytest
from nbformat import v4
from traitlets import TraitError

from nbos_provisioner import filing
from nbos_provisioner.filing import Filing, place
from nbos_provisioner.provisioner import NBOSProvisioner


def kept(**changed: Any) -> dict[str, Any]:
    pieces = [
        ["stream", {"name": "stdout", "text": "a\n"}, 10, 1],
        ["stream", {"name": "stdout", "text": "b\n"}, 10, 1],
        ["display_data", {"data": {"text/plain": "c"}, "metadata": {}, "transient": {"display_id": "d"}}, 10, 1],
        ["stream", {"text": "nonsense of the user's own making"}, 10, 1],
        ["error", {"ename": "E", "evalue": "v", "traceback": ["t"]}, 10, 1],
    ]
    return {"cell": "known", "code": "f()", "count": 3, "ended": True, "note": "", "pieces": pieces, **changed}


def notebook(*cells: Any) -> Any:
    return v4.new_notebook(cells=list(cells))


def test_outputs_replace_what_stands_below_the_cell() -> None:
    cell = v4.new_code_cell("f()", id="known", outputs=[v4.new_output("stream", text="old")])
    book = notebook(v4.new_code_cell("g()", id="other"), cell)
    place(book, kept())
    nbformat.validate(book)
    assert [output["output_type"] for output in cell["outputs"]] == ["stream", "display_data", "error"]
    assert (cell["outputs"][0]["text"], cell["execution_count"]) == ("a\nb\n", 3)
    assert book["cells"][0]["outputs"] == []


def test_a_cell_that_was_never_saved_is_added_with_its_code() -> None:
    book = notebook(v4.new_code_cell("g()", id="other"))
    place(book, kept(ended=False))
    nbformat.validate(book)
    added = book["cells"][1]
    assert (added["id"], added["source"]) == ("known", "f()")
    assert "still runs" in added["outputs"][-1]["text"]


def test_a_cell_that_has_become_text_is_left_alone() -> None:
    book = notebook(v4.new_markdown_cell("words", id="known"))
    place(book, kept())
    assert book == notebook(v4.new_markdown_cell("words", id="known"))


@pytest.mark.parametrize(("option", "value"), [("keep_bytes", -1), ("keep_bytes", 1 << 40), ("keep_messages", 0)])
def test_an_option_out_of_bounds_is_named_with_the_way_out(option: str, value: int) -> None:
    with pytest.raises(TraitError, match=rf"NBOSProvisioner.{option} = {value}: must be from \d+ to \d+"):
        NBOSProvisioner(**{option: value})


class Told(Filing):
    """Notes what the router would be told."""

    def __init__(self) -> None:
        super().__init__({"k": None}, None, None, logging.getLogger())
        self.told: list[Any] = []

    def _tell(self, kernel_id: str, content: dict[str, Any]) -> None:
        self.told.append((kernel_id, content))


async def test_what_a_page_was_sent_is_forgotten_once_its_connection_has_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sockets: dict[tuple[str, str], object] = {("k", "page"): object()}
    monkeypatch.setattr(filing, "open_websocket", lambda kernel, session: sockets.get((kernel, session)))
    monkeypatch.setattr(filing, "CERTAIN", 0.1)
    told = Told()
    told.ended("k", "page", "one")
    told.ended("k", "gone", "other")
    await asyncio.sleep(0.05)
    sockets["k", "page"] = object()  # the first connection was dead, and nobody knew
    told.ended("k", "page", "two")
    await asyncio.sleep(0.08)
    assert told.told == [], "it has held for less than it takes"
    async with asyncio.timeout(5):
        while not told.told:
            await asyncio.sleep(0.01)
    assert told.told == [("k", {"forget": ["one", "two"]})]
