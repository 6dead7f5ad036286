"""Lines that set something in IPython reach the other replica, once each, and a failure there is named."""

from __future__ import annotations

from typing import Any

import pytest

from nbos_kernel.settings import NAME

from .pair import Pair


@pytest.fixture
def pair() -> Pair:
    return Pair()


def precision(pair: Pair) -> Any:
    return pair.standby.shell.display_formatter.formatters["text/plain"].float_precision


def test_precision_config_and_extensions_are_set_on_the_standby(pair: Pair) -> None:
    pair.cell("%precision 3\n%config InteractiveShell.ast_node_interactivity = 'all'")
    pair.cell("%load_ext autoreload\n%autoreload 2")
    assert precision(pair) == "3"
    assert pair.standby.shell.ast_node_interactivity == "all"
    assert "IPython.extensions.autoreload" in pair.standby.shell.extension_manager.loaded
    assert pair.cell("x = 1")["components"][0]["names"] == ["x"]
    pair.switch()
    assert "%settings" not in [name for c in pair.cell("y = 1")["components"] for name in c["names"]]
    pair.cell("%precision 5")
    assert precision(pair) == "5"


def test_a_line_is_run_again_once_and_its_failure_is_named(pair: Pair) -> None:
    pair.standby.shell.register_magic_function(lambda line: 1 / 0, magic_name="xmode")
    pair.cell("%xmode Plain")
    assert "ZeroDivisionError" in pair.standby.replica.lost["%xmode Plain"]
    pair.cell("%precision 2")
    pair.standby.shell.display_formatter.formatters["text/plain"].float_precision = "7"
    pair.cell("x = 1")
    assert precision(pair) == "7"


def test_lines_that_set_nothing_are_not_kept(pair: Pair) -> None:
    entry = pair.cell("%pwd\n%config InteractiveShell\n%load_ext not_there")
    assert NAME not in [name for component in entry["components"] for name in component["names"]]
