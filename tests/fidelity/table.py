"""Runs the fidelity suite and says what came of each case; `python -m tests.fidelity.table --write` writes
docs/fidelity.md."""

from __future__ import annotations

import functools
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from .cases import CASES, Case

ROOT = Path(__file__).parents[2]
BATCHES = 2


class Outcome(NamedTuple):
    """`what`: 'same', 'lost' (each name with its reason) or 'different' (a failure)."""

    case: Case
    what: str
    detail: str


def run() -> list[Outcome]:
    """Every case, on two executor processes and then on two standby processes."""
    found = _everything()
    return [judge(case, found["executor"][n], found["standby"][n]) for n, case in enumerate(CASES)]


@functools.cache
def _everything() -> dict[str, dict[int, Any]]:
    return _processes(("executor", "1"), ("standby", "2"), ("eager", "2"), ("lazy", "2"))


def _processes(*roles: tuple[str, str]) -> dict[str, dict[int, Any]]:
    """What the processes of each role wrote, by case. `roles`: each with its hash seed, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, dict[int, Any]] = {role: {} for role, _ in roles}
        files, saved = Path(folder, "files"), Path(folder, "saved")
        files.mkdir()
        for role, seed in roles:
            environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
            environment["TMPDIR"] = str(files)
            if saved.exists():  # every role finds the files that the executor left
                shutil.rmtree(files)
                shutil.copytree(saved, files)
            running = [
                subprocess.Popen(
                    [sys.executable, "-m", "tests.fidelity.side", role, f"{folder}/{batch}", str(batch), str(BATCHES)],
                    cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                )
                for batch in range(BATCHES)
            ]  # fmt: skip
            for batch, process in enumerate(running):
                _, errors = process.communicate(timeout=600)
                path = Path(f"{folder}/{batch}.{role}")
                if not path.exists():
                    raise RuntimeError(f"{role} {batch} ended with {process.returncode}: {errors.decode()[-2000:]}")
                found[role].update(pickle.loads(path.read_bytes()))
            if not saved.exists():
                shutil.copytree(files, saved)
    return found


class Pairing(NamedTuple):
    """What a replica that loads everything and one that loads on first use say after the same failover."""

    case: Case
    eager: dict[str, Any]
    lazy: dict[str, Any]

    def differences(self) -> dict[str, Any]:
        found = {
            key: _parts(self.eager.get(key), self.lazy.get(key)) for key in self.eager | self.lazy if key != "left"
        }
        return {key: parts for key, parts in found.items() if parts}


def _parts(eager: Any, lazy: Any) -> Any:
    if not isinstance(eager, dict) or not isinstance(lazy, dict):
        return None if eager == lazy else (eager, lazy)
    eager, lazy = ({name: _ID.sub("", str(said)) for name, said in side.items()} for side in (eager, lazy))
    different = [name for name in eager | lazy if eager.get(name) != lazy.get(name)]
    return {name: (eager.get(name), lazy.get(name)) for name in different if name not in _OF_PROCESS}


_ID = re.compile(r"_stop_words_id\W+int\W+\d+")
"""scikit-learn notes an `id()`, which no two processes have alike."""

_OF_PROCESS = ("__warningregistry__",)
"""Python's own notes of which warnings were shown; what else ran in the process stands in it."""


def take_over() -> list[Pairing]:
    """Every case on a replica that took over after its first cell: with all values loaded, and with none."""
    found = _everything()
    return [Pairing(case, found["eager"][n], found["lazy"][n]) for n, case in enumerate(CASES)]


def judge(case: Case, executor: dict[str, Any], standby: dict[str, Any]) -> Outcome:
    """Compare what the two sides said of themselves."""
    for side in (executor, standby):
        if "crash" in side:
            return Outcome(case, "different", side["crash"].strip().splitlines()[-1])
    if executor["error"]:
        return Outcome(case, "different", "the case itself fails: " + executor["error"])
    lost = standby["lost"]
    problems = []
    for name in sorted(executor["each"].keys() | standby["each"].keys()):
        here, there = executor["each"].get(name), standby["each"].get(name)
        if here == there or name in lost:
            continue
        if name.startswith("=> ") and lost:
            continue  # what is looked at names a lost variable
        problems.append(f"{name}: {_differ(here, there)}")
    if not lost:
        for name, said in executor["together"].items():
            if said != standby["together"].get(name) and executor["each"][name] == standby["each"].get(name):
                problems.append(f"{name} shares other things: {_differ(said, standby['together'].get(name))}")
    if problems:
        return Outcome(case, "different", "; ".join(problems))
    if lost:
        return Outcome(case, "lost", "; ".join(f"`{name}`: {reason}" for name, reason in sorted(lost.items())))
    return Outcome(case, "same", "")


def _differ(here: str | None, there: str | None) -> str:
    if here is None or there is None:
        return f"{'not ' if here is None else ''}on the executor, {'not ' if there is None else ''}on the standby"
    at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), 0)
    return f"…{here[max(0, at - 60) : at + 80]}… against …{there[max(0, at - 60) : at + 80]}…"


def as_markdown(outcomes: list[Outcome]) -> str:
    """docs/fidelity.md."""
    counts = {what: sum(1 for each in outcomes if each.what == what) for what in ("same", "lost", "different")}
    lines = [
        "# What a failover keeps",
        "",
        "Written by `python -m tests.fidelity.table --write`. Each row is two cells run on one process; "
        "what a "
        "daemon would have got is applied by another process with another hash seed, and everything the two hold is "
        "compared deeply: values, types, sharing, and "
        "what the values do. *same*: no difference. *lost*: named as not replicated, with the reason; "
        "touching it after a failover raises an error that says so. *different*: a silent difference, which is a bug.",
        "",
        f"{len(outcomes)} pairs: **{counts['same']} same, {counts['lost']} lost with a reason, "
        f"{counts['different']} different**.",
    ]
    for area in dict.fromkeys(each.case.area for each in outcomes):
        lines += ["", f"## {area}", "", "| made | modified | outcome |", "|---|---|---|"]
        for each in outcomes:
            if each.case.area == area:
                text = each.what if each.what == "same" else f"{each.what}: {each.detail[:160]}"
                lines.append(f"| {_cell(each.case.make)} | {_cell(each.case.modify)} | {_plain(text)} |")
    return "\n".join(lines) + "\n"


def _cell(code: str) -> str:
    short = code.replace("\n", " ⏎ ")
    return "`" + (short if len(short) <= 110 else short[:108] + "…").replace("|", "\\|").replace("`", "'") + "`"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def main() -> None:
    outcomes = run()
    for each in outcomes:
        wrong = each.what == "different" or (each.what == "lost") != each.case.lost
        if wrong or "-v" in sys.argv:
            print(f"[{each.what}] {each.case.make!r} // {each.case.modify!r}\n      {each.detail[:500]}")
    print({what: sum(1 for each in outcomes if each.what == what) for what in ("same", "lost", "different")})
    if "--write" in sys.argv:
        (ROOT / "docs" / "fidelity.md").write_text(as_markdown(outcomes))


if __name__ == "__main__":
    main()
