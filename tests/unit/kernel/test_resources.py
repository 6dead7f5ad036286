"""What a cell asks of the GPUs, read from its first line, its metadata or the kernel's default."""

from __future__ import annotations

import pytest

from nbos_kernel import resources
from nbos_kernel.magics import strip_resource_line

DEFAULT = {"gpus": 1, "tpcs": 0, "memory": 0, "model": ""}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1", {"gpus": 1}),
        ("%%cpu\nx", {}),
        ("%%gpu\nx", {"gpus": 1}),
        ("\n  %%gpu 2 model=H100\nx", {"gpus": 2, "model": "H100"}),
        ("%%gpu tpcs=16 mem=1.5G\nx", {"tpcs": 16, "memory": 3 * 2**29}),
        ("%%replay\n%%gpu 2\nx", {"gpus": 2}),
        ("%%gpu 2\n%%replay\nx", {"gpus": 2}),
        ("x\n%%gpu 2", {"gpus": 1}),
    ],
)
def test_the_first_line_decides(code: str, expected: dict[str, object]) -> None:
    assert resources.of_cell(code, {}, DEFAULT) == {**resources.NONE, **expected}


def test_metadata_comes_before_the_default() -> None:
    assert resources.of_cell("x", {"nbos": {"resources": {"tpcs": 4}}}, DEFAULT)["tpcs"] == 4


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("%%gpu 65", "0 to 64"),
        ("%%gpu one", "whole number"),
        ("%%gpu 0", "nothing"),
        ("%%gpu 1 tpcs=4", "either"),
        ("%%gpu cores=4", "cores"),
        ("%%gpu mem=lots", "size"),
        ("%%gpu 1 gpus=2", "twice"),
        ("%%cpu 4", "no arguments"),
    ],
)
def test_a_mistake_is_named(line: str, word: str) -> None:
    with pytest.raises(resources.BadResources, match=word):
        resources.of_cell(line + "\nx", {}, DEFAULT)


def test_every_mistake_in_the_line_names_the_magic() -> None:
    for line in ("%%gpu 1 mem=lots", "%%gpu 65", "%%gpu tpcs=x", "%%gpu 1 tpcs=4"):
        with pytest.raises(resources.BadResources, match="%%gpu"):
            resources.of_cell(line, {}, DEFAULT)


@pytest.mark.parametrize(
    "ours", ["much", [1], {"resources": 3}, {"resources": {"tpcs": "4"}}, {"resources": {"tpcs": 4.0}}]
)
def test_metadata_that_cannot_be_meant_is_refused(ours: object) -> None:
    with pytest.raises(resources.BadResources):
        resources.of_cell("x", {"nbos": ours}, DEFAULT)
    assert not resources.in_first_line("x")


def test_the_line_becomes_a_comment_unless_another_magic_follows() -> None:
    assert strip_resource_line(["%%gpu 1\n", "x\n"]) == ["# %%gpu 1\n", "x\n"]
    assert strip_resource_line(["%%gpu 1\n", "%%time\n", "x\n"]) == ["%%time\n", "x\n"]
    assert strip_resource_line(["%%gpu 99\n", "x\n"]) == ["%%gpu 99\n", "x\n"]


@pytest.mark.parametrize(
    ("held", "asked", "enough"),
    [
        ({}, {}, True),
        ({}, {"gpus": 1}, False),
        ({"gpus": 1}, {"gpus": 1}, True),
        ({"gpus": 1}, {"gpus": 2}, False),
        ({"gpus": 1}, {"tpcs": 16, "memory": 2**30}, True),
        ({"tpcs": 8, "memory": 2**30}, {"tpcs": 16}, False),
        ({"tpcs": 16, "memory": 2**30}, {"tpcs": 16, "memory": 2**31}, False),
        ({"tpcs": 16}, {"gpus": 1}, False),
        ({"gpus": 1, "model": "A100"}, {"gpus": 1, "model": "H100"}, False),
    ],
)
def test_what_a_cell_holds_covers_what_another_asked_for(
    held: dict[str, object], asked: dict[str, object], enough: bool
) -> None:
    assert resources.covers({**resources.NONE, **held}, {**resources.NONE, **asked}) is enough


@pytest.mark.parametrize(
    ("line", "borrows"),
    [("tpcs=4", 0), ("tpcs=4 borrow=max", 512), ("borrow=3 tpcs=4", 3), ("tpcs=4 borrow=no", resources.NOTHING)],
)
def test_a_slice_says_what_it_could_borrow(line: str, borrows: int) -> None:
    code = f"%%gpu {line}\n1"
    assert resources.of_cell(code, {}, {})["tpcs"] == 4
    assert resources.borrow(code, {}) == borrows


@pytest.mark.parametrize(("said", "borrows"), [("max", 512), (True, 512), (False, -1), ("no", -1), (7, 7)])
def test_metadata_says_it_too(said: object, borrows: int) -> None:
    assert resources.borrow("1", {"nbos": {"borrow": said}}) == borrows


@pytest.mark.parametrize("line", ["1 borrow=max", "tpcs=4 borrow=", "tpcs=4 borrow=all", "tpcs=4 borrow=-2"])
def test_what_cannot_be_borrowed_is_refused(line: str) -> None:
    with pytest.raises(resources.BadResources, match="borrow"):
        resources.of_cell(f"%%gpu {line}\n1", {}, {})


def test_wrong_metadata_is_refused() -> None:
    with pytest.raises(resources.BadResources, match="borrow must be max, no, or a number"):
        resources.borrow("1", {"nbos": {"borrow": 1.5}})
