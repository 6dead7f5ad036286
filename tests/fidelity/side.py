"""One process of the fidelity suite: `python -m tests.fidelity.side executor|standby|eager|lazy FILE FIRST STEP`.

The executor runs the cases and writes what its daemon would have got, with a description of what it holds; the
standby applies that, in a process of its own with another hash seed, and describes what it holds then. `eager` and
`lazy` take over between the two cells of a case and run the second one.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from typing import Any

from nbos_cluster import content
from nbos_kernel import lost
from nbos_kernel.capture import names, rebuilt
from nbos_kernel.capture.unloaded import OFF
from nbos_kernel.entries import Layout
from tests.unit.kernel.pair import Side

from .cases import CASES, Case
from .describe import Describer

Recorded = dict[str, Any]


def describe(side: Side, look: str) -> dict[str, Any]:
    """Every variable and what `look` gives, each alone, and all variables together (for what they share)."""
    found: dict[str, Any] = {}
    values = dict(names.user_variables(side.ns, side.shell.user_ns_hidden))
    for name, value in values.items():
        found[name] = _said(lambda value=value: Describer(side.ns).of(value))
    together = Describer(side.ns)
    shared = {}
    for name in sorted(values):
        shared[name] = _said(lambda name=name: together.of(values[name]))
    if look:
        found["=> " + look] = _said(lambda: Describer(side.ns).of(side.eval(look)))
    return {"each": found, "together": shared}


def _said(call: Any) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return repr(call())
    except BaseException as err:  # noqa: BLE001 - what fails on one side has to fail on the other
        return f"raises {type(err).__name__}: {err}"[:200]


def _drive(work: Any) -> None:
    """Run a coroutine that never waits, in this context: what it sets in context variables (decimal) stays."""
    try:
        work.send(None)
    except StopIteration:
        return
    raise RuntimeError("applying an entry waited for something")


def execute(case: Case) -> Recorded:
    side = Side({})
    recorded: Recorded = {"messages": [], "lost": {}, "error": ""}
    for n, code in enumerate((case.make, case.modify), 1):
        result = side.run(code)
        if result.error_before_exec or result.error_in_exec:
            recorded["error"] = repr(result.error_before_exec or result.error_in_exec)
        capture = side.replica.capture
        capture.note_source(code)
        found = capture.changes()
        capture.accept(found)
        lost.install(side.ns, capture.lost)
        layout = Layout(found.components)
        for _, chunk, data in layout.blobs(found.components):
            chunk.address = chunk.address or content.address(data)
            side.blobs[chunk.address] = bytes(data)
        components, payload = layout.encode(found.components)
        entry = {
            "n": n, "kind": "cell", "status": "ok", "execution_count": side.replica.history.last(), "source": code,
            "components": components, "deleted": found.deleted, "lost": found.lost,
            "effects": side.replica.watcher.changes(),
        }  # fmt: skip
        recorded["messages"].append((json.dumps({"type": "entry", "entry": entry}), payload))
        del found, layout
        for _ in capture.settle():
            pass
        side.replica.own(n)
    recorded["blobs"], recorded["lost"] = side.blobs, dict(capture.lost)
    recorded.update(describe(side, case.look))
    rebuilt.put_registered({})
    return recorded


def stand_by(case: Case, recorded: Recorded) -> Recorded:
    side = Side(recorded["blobs"])
    for message, payload in recorded["messages"]:
        side.replica.arrived(json.loads(message), payload)
        _drive(side.replica.catch_up(lambda n, lost: None))
    found = {"lost": dict(side.replica.lost)}
    return {**found, **describe(side, case.look)}


def take_over(case: Case, recorded: Recorded, threshold: int) -> Recorded:
    """The first cell came from the log, the second one runs here: on a replica that left everything unloaded, or on
    one that loaded everything."""
    side = Side(recorded["blobs"], threshold)
    message, payload = recorded["messages"][0]
    side.replica.arrived(json.loads(message), payload)
    _drive(side.replica.catch_up(lambda n, lost: None))
    left = len(side.replica.lazy.table)
    result = side.run(case.modify)
    found: Recorded = {"error": repr(result.error_before_exec or result.error_in_exec), "left": left}
    taken = side.replica.take_changes(case.modify)
    found["deleted"] = sorted({*taken.changes.deleted} - {"__warningregistry__"})
    found["lost"] = dict(side.replica.lost)
    looked = _said(lambda: Describer(side.ns).of(side.eval(case.look))) if case.look else ""
    for name in side.replica.lazy.table:
        side.eval(name)
    found.update(describe(side, case.look))
    rebuilt.put_registered({})
    return {**found, "looked": looked}


def _play(role: str, case: Case, recorded: Recorded) -> Recorded:
    if role == "executor":
        return execute(case)
    if role == "standby":
        return stand_by(case, recorded)
    return take_over(case, recorded, 1 if role == "lazy" else OFF)


def main(role: str, path: str, first: int, step: int) -> None:
    done: dict[int, Recorded] = {}
    recorded: dict[int, Recorded] = {}
    if role != "executor":
        with open(path + ".executor", "rb") as file:
            recorded = pickle.load(file)
    os.chdir(tempfile.gettempdir())
    for number, case in list(enumerate(CASES))[first::step]:
        try:
            done[number] = _play(role, case, recorded.get(number, {}))
        except BaseException:  # noqa: BLE001 - one case must not end the others
            done[number] = {"crash": traceback.format_exc()}
    with open(f"{path}.{role}", "wb") as out:
        pickle.dump(done, out)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
