"""A namespace in words, on whichever side: a notebook calls `tell`; run as a program this is plain Python.

The program reads its story from stdin: cells to run one after the other, and names that are gone at some point.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import types
import warnings
from pathlib import Path
from typing import Any


def tell(namespace: dict[str, Any], names: tuple[str, ...]) -> str:
    """JSON: which of `names` are there, and what each is, with what it shares with those before it."""
    describer = runpy.run_path(str(Path(__file__).with_name("describe.py")))["Describer"](namespace)
    said = {}
    for name in names:
        if name in namespace:
            try:
                said[name] = repr(describer.of(namespace[name]))
            except Exception as err:  # noqa: BLE001 - what fails on one side has to fail on the other
                said[name] = type(err).__name__
    return json.dumps({"names": list(said), "said": said})


def main() -> None:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    for step in json.load(sys.stdin):
        for name in step.get("gone", ()):
            vars(module).pop(name, None)
        vars(sys.modules["collections"]).pop("kept", None) if "gone" in step else None
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(Exception):
                exec(compile(step.get("code", ""), "<cell>", "exec", dont_inherit=True), vars(module))
    print(tell(vars(module), ("a", "b", "c", "d", "e")))


if __name__ == "__main__":
    main()
