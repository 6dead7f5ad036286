"""Which modules a replica says that its cells import."""

from __future__ import annotations

import sys
import types

import pytest

from nbos_kernel.imported import Imports, named


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import numpy as np, pandas", ["numpy", "pandas"]),
        ("%matplotlib inline\nimport matplotlib.pyplot as plt  # a, b", ["matplotlib.pyplot"]),
        ("from sklearn.svm import (SVC,\n  SVR)", ["sklearn.svm", "sklearn.svm.SVC"]),
        ("def f():\n    from a import b as c, d", ["a", "a.b", "a.d"]),
        ("from . import x\nimporting = 1\nprint('import os')", [".", "..x"]),
        ("import", []),
    ],
)
def test_import_statements_are_read_wherever_they_stand(source: str, names: list[str]) -> None:
    assert list(named(source)) == names


def test_only_installed_modules_that_are_loaded_are_told_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = Imports()
    module = types.ModuleType("installed_module_of_a_test")
    module.__file__ = imports._folders[0] + "installed_module_of_a_test.py"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    own = types.ModuleType("own_module_of_a_test")
    own.__file__ = "/home/somebody/own_module_of_a_test.py"
    monkeypatch.setitem(sys.modules, own.__name__, own)
    imports.ran("import installed_module_of_a_test, own_module_of_a_test, json, not_there")
    assert imports.news() == ["installed_module_of_a_test"]
    assert imports.news() == []
    imports.ran("import installed_module_of_a_test")
    assert imports.news() == []
