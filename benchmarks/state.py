"""What keeping the state costs, case by case, on a real cluster; beside it what a user would do otherwise.

`nbos up` is started with three hosts on this machine; a kernel with three replicas and a plain ipykernel take turns on
the same cells. "safe after" is the time from the end of the cell's code until its entry is committed and its blobs are
on the disk, "last standby after" until both standbys have applied it, on the clock that all processes share. Then plain
kernels that save everything after each cell (cloudpickle, dill, Kishu) run the same cells: what they add to the reply.

Kishu gets a Python of its own:
    python -m venv /some/place/kishu && /some/place/kishu/bin/pip install kishu==0.3.4
    python benchmarks/state.py --kishu /some/place/kishu/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from measure import Table, scratch
from state_cases import CASES, GB, MB, Bar, Case, Round
from state_sides import Ours, TooSlow, ours, plain, rival, run

RIVALS = ("cloudpickle", "dill", "Kishu")
RIVAL_TIMEOUT = 90.0


def measure(side: Ours, case: Case) -> list[Round]:
    """The case on a new kernel of NBOS and a new plain one, in turns."""
    rounds = []
    with plain() as other, side.kernel() as client:
        for code in filter(None, [case.setup]):
            run(other, code)
            run(client, code)
            side.stamps.next()
        for number in range(case.warm + case.rounds):
            code = case.cell.format(round=number + 1)
            before = side.stored()
            alone, reply = run(other, code), run(client, code)
            stages = side.stamps.next()
            if number >= case.warm:
                written = side.stored() - before
                rounds.append(Round(alone, reply, stages.captured, stages.committed, stages.standby, written))
    return rounds


def measure_rival(name: str, case: Case, base: float, folder: Path, kishu: Path | None) -> tuple[float, int] | str:
    """Seconds that it adds to the reply and bytes it saved, or why there is no number."""
    if name == "Kishu" and kishu is None:
        return "no --kishu"
    if name != "Kishu" and importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        with rival(name, folder, kishu) as side:
            for code in filter(None, [case.setup]):
                run(side.client, code, RIVAL_TIMEOUT)
            before = side.size() if name == "Kishu" else 0  # its database grows, the others' file is written anew
            took = run(side.client, case.cell.format(round=1), RIVAL_TIMEOUT)
            return took - base, side.size() - before
    except TooSlow:
        return f"> {RIVAL_TIMEOUT:.0f} s"
    except RuntimeError as err:
        return f"fails: {str(err)[:60]}"


def speeds() -> str:
    """What this machine's memory and hashes do, one thread, on 256 MB in pieces of 4 MB."""
    import xxhash
    from blake3 import blake3

    source, target = bytearray(256 << 20), memoryview(bytearray(256 << 20))
    parts = [memoryview(source)[at : at + (4 << 20)] for at in range(0, len(source), 4 << 20)]

    def copy() -> None:
        target[:] = source

    works: dict[str, Callable[[], object]] = {
        "memcpy": copy,
        "xxh3": lambda: [xxhash.xxh3_64_digest(part) for part in parts],
        "blake3": lambda: [blake3(part).digest() for part in parts],
    }
    found = []
    for name, work in works.items():
        took = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            took.append(time.perf_counter() - began)
        found.append(f"{name} {len(source) / median(took) / GB:.1f}")
    return "one thread, GB/s: " + ", ".join(found)


def table_of_ours(results: dict[str, list[Round]]) -> str:
    table = Table(
        "NBOS, three replicas on this machine, medians; milliseconds where nothing else is said",
        ("case", "plain reply", "reply +", "captured", "written MB", "safe after", "last standby"),
    )
    for case in CASES:
        if case.name in results:
            rounds = results[case.name]
            cells = [median(getattr(r, field) for r in rounds) for field in ("captured", "committed", "standby")]
            base, reply = median(r.plain for r in rounds), median(r.reply for r in rounds)
            captured, committed, standby = (f"{value * 1e3:.1f}" for value in cells)
            written = f"{median(r.written for r in rounds) / MB:.2f}"
            table.add(
                case.title, f"{base * 1e3:.1f}", f"{(reply - base) * 1e3:+.1f}", captured, written, committed, standby
            )
    return table.render()


def table_of_bars(results: dict[str, list[Round]]) -> str:
    table = Table("the bars", ("case", "bar", "measured", ""))
    for case in CASES:
        for bar in case.bars if case.name in results else ():
            value = bar.value(results[case.name])
            table.add(case.title, bar.text, _shown(bar, value), "met" if bar.met(value) else "MISSED")
    return table.render()


def _shown(bar: Bar, value: float) -> str:
    return bar.shown.format(value * bar.scale)


def table_of_rivals(results: dict[str, list[Round]], others: dict[tuple[str, str], tuple[float, int] | str]) -> str:
    table = Table(
        "what they add to the reply, and MB saved; in brackets: how many times NBOS's time until it is safe",
        ("case", "NBOS reply +", "NBOS safe after", *RIVALS),
    )
    for case in CASES:
        if case.name in results:
            rounds = results[case.name]
            safe = median(r.committed for r in rounds)
            added = median(r.reply for r in rounds) - median(r.plain for r in rounds)
            row = []
            for name in RIVALS:
                found = others.get((case.name, name), "–")
                if isinstance(found, str):
                    row.append(found)
                else:
                    row.append(f"{found[0]:.2f} s, {found[1] / MB:.1f} MB ({found[0] / safe:.0f} ×)")
            table.add(case.title, f"{added * 1e3:+.1f} ms", f"{safe * 1e3:.1f} ms", *row)
    return table.render()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--case", nargs="*", choices=names, default=names, help="only these")
    parser.add_argument("--kishu", type=Path, help="a Python that has Kishu")
    parser.add_argument("--alone", action="store_true", help="NBOS without the others")
    parser.add_argument("--rounds", type=int, help="measured cells of each case")
    options = parser.parse_args()
    results: dict[str, list[Round]] = {}
    others: dict[tuple[str, str], tuple[float, int] | str] = {}
    chosen = [case for case in CASES if case.name in options.case]
    print(speeds(), flush=True)
    with scratch("nbos-state-") as folder:
        with ours(folder) as side:
            for case in chosen:
                if options.rounds:
                    case = Case(case.name, case.title, case.setup, case.cell, case.bars, options.rounds, case.warm)
                results[case.name] = measure(side, case)
                print(f"… {case.title}: done", flush=True)
        for case in chosen if not options.alone else ():
            base = median(r.plain for r in results[case.name])
            for name in RIVALS:
                with contextlib.suppress(OSError):
                    others[case.name, name] = measure_rival(name, case, base, folder, options.kishu)
    print(table_of_ours(results), table_of_bars(results), sep="\n\n")
    if others:
        print("", table_of_rivals(results, others), sep="\n")


if __name__ == "__main__":
    main()
