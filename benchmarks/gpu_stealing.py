"""Part of `real_gpu.py`: an important tenant with bursts beside a steady borrower, side by side under MPS.

The important tenant owns three fifths of the TPCs; it idles, then runs some GEMMs, and what counts is the time from its
asking to its end. The borrower runs GEMMs all the time: on the rest only (quotas), or on everything while the other
is idle (stealing). This process plays the daemon: it lets a burst begin when the borrower has said that it is off the
TPCs, at the end of its step.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from statistics import quantiles
from typing import Any

Side = subprocess.Popen[str]
Start = Callable[[dict[str, Any]], Side]


class Ended(Exception):
    """A side ended, or took too long, and does not say what it should."""


def stealing(start: Start, tpcs: int, seconds: float) -> list[list[str]]:
    """Rows: way, the important tenant's bursts, the borrower's steps. seconds: of each way.

    Raises Ended.
    """
    quota = max(1, 3 * tpcs // 5)
    own, rest = list(range(quota)), list(range(quota, tpcs))
    alone, _ = contest(start, own, [], [], seconds)
    rows = [["the important tenant alone", told(alone, alone), ""]]
    for name, lent in (("quotas", rest), ("quotas + stealing", own + rest)):
        took, steps = contest(start, own, rest, lent, seconds)
        rows.append([name, told(took, alone), f"the other: {steps / seconds:.1f} steps a second"])
    return rows


def told(took: list[float], alone: list[float]) -> str:
    p50, p99 = (f"p{p} {at(took, p) * 1e3:.2f} ms" for p in (50, 99))
    return f"{p50}, {p99} ({at(took, 99) / at(alone, 99):.2f} × alone)"


def at(took: list[float], percent: int) -> float:
    if len(took) < 2:
        raise Ended(f"{len(took)} bursts in all; measure for longer (--seconds)")
    return quantiles(took, n=100, method="inclusive")[percent - 1]


def contest(start: Start, own: list[int], rest: list[int], lent: list[int], seconds: float) -> tuple[list[float], int]:
    """Seconds of each burst, and the borrower's steps meanwhile. rest: the borrower's TPCs, none: there is no borrower.
    lent: those it is on while the important tenant is idle."""
    borrower = start({"do": "borrow", "tpcs": rest}) if rest else None
    sides = [borrower] if borrower else []
    timer = threading.Timer(120 + 3 * seconds, lambda: [side.kill() for side in sides])
    timer.start()
    try:
        if borrower:
            heard(borrower, "ready")
        important = start({"do": "burst", "tpcs": own, "seconds": seconds})
        sides.append(important)
        heard(important, "ready")
        if borrower:
            say(borrower, {"count": True})
        say(important, {})
        took = relay(important, borrower, rest, lent)
        steps = ask(borrower, {"end": True}, "steps") if borrower else 0
    finally:
        timer.cancel()
        for side in sides:
            side.kill()
            side.communicate()
    return took, int(steps)


def relay(important: Side, borrower: Side | None, rest: list[int], lent: list[int]) -> list[float]:
    """Between the two, until the important tenant has told what its bursts took."""
    lending = borrower is not None and lent != rest
    while True:
        if lending:
            ask(borrower, {"tpcs": lent}, "on")
        message = line(important)
        if "took" in message:
            return [float(each) for each in message["took"]]
        if lending:
            ask(borrower, {"tpcs": rest}, "on")
        say(important, {})  # a burst may begin
        heard(important, "over")


def say(side: Side, message: dict[str, Any]) -> None:
    assert side.stdin is not None
    try:
        side.stdin.write(json.dumps(message) + "\n")
        side.stdin.flush()
    except OSError as err:
        raise Ended(why(side)) from err


def line(side: Side) -> dict[str, Any]:
    assert side.stdout is not None
    text = side.stdout.readline()
    if not text:
        raise Ended(why(side))
    message: dict[str, Any] = json.loads(text)
    return message


def heard(side: Side, what: str) -> Any:
    message = line(side)
    if what not in message:
        raise Ended(f"a side said {message}, not {what}")
    return message[what]


def ask(side: Side | None, message: dict[str, Any], what: str) -> Any:
    assert side is not None
    say(side, message)
    return heard(side, what)


def why(side: Side) -> str:
    side.kill()
    _, err = side.communicate()
    return (err.strip().splitlines() or ["a side ended, or took too long"])[-1][:150]
