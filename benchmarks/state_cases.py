"""The cases of `state.py`: what the namespace holds, what the cell does, and what it may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

MB, GB = 1e6, 1e9


@dataclass(frozen=True)
class Round:
    """One measured cell on NBOS. Times in seconds; those of later stages count from the end of the cell's code."""

    plain: float
    reply: float
    captured: float
    committed: float
    standby: float
    """Until the last standby has applied it."""
    written: int


def _added(rounds: list[Round]) -> float:
    return median(r.reply for r in rounds) - median(r.plain for r in rounds)


@dataclass(frozen=True)
class Bar:
    """What is held against a number: the text, the number, and whether it is met."""

    text: str
    value: Callable[[list[Round]], float]
    met: Callable[[float], bool]
    shown: str = "{:.1f} ms"
    scale: float = 1e3


def at_most(what: str, value: Callable[[list[Round]], float], limit: float, shown: str, scale: float) -> Bar:
    return Bar(f"{what} ≤ {shown.format(limit * scale)}", value, lambda v: v <= limit, f"{what} {shown}", scale)


def reply_within(seconds: float) -> Bar:
    return at_most("reply +", _added, seconds, "{:.1f} ms", 1e3)


def written_within(size: float) -> Bar:
    return at_most("written", lambda rounds: median(r.written for r in rounds), size, "{:.1f} MB", 1 / MB)


def committed_within(seconds: float) -> Bar:
    return at_most("safe after", lambda rounds: median(r.committed for r in rounds), seconds, "{:.3f} s", 1)


def standby_within(seconds: float) -> Bar:
    return at_most("last standby after", lambda rounds: median(r.standby for r in rounds), seconds, "{:.3f} s", 1)


def check_at(speed: float, size: float) -> Bar:
    def value(rounds: list[Round]) -> float:
        return size / median(r.captured for r in rounds)

    text = f"check ≥ {speed / GB:.0f} GB/s"
    return Bar(text, value, lambda v: v >= speed, "check {:.1f} GB/s", 1 / GB)


def to_standby_at(speed: float) -> Bar:
    def value(rounds: list[Round]) -> float:
        return median(r.written / r.standby for r in rounds)

    return Bar(f"≥ {speed / GB:.0f} GB/s", value, lambda v: v >= speed, "to the last standby {:.2f} GB/s", 1 / GB)


@dataclass(frozen=True)
class Case:
    """`setup` and `cell` are code; `{round}` in a cell is its number. warm: cells that are not measured."""

    name: str
    title: str
    setup: str
    cell: str
    bars: tuple[Bar, ...]
    rounds: int = 5
    warm: int = 1


CASES = (
    Case(
        "pass",
        "`pass`; 1,000 variables, 1,000,000 objects",
        "for i in range(1000): globals()[f'v{i}'] = [[i, j] for j in range(1000)]\ndel i",
        "pass",
        (reply_within(0.005),),
        rounds=40,
        warm=10,
    ),
    Case(
        "float",
        "one float changed in a 1 GB array",
        "import numpy as np\na = np.random.default_rng(0).random(125_000_000)",
        "a[{round} * 1_000_003] += 1",
        (written_within(16e6), standby_within(1.0)),
    ),
    Case(
        "read",
        "a cell that only reads; 4 GB of arrays",
        "import numpy as np\narrays = [np.full(125_000_000, float(i)) for i in range(4)]",
        "s = float(arrays[{round} % 4][{round}])",
        (reply_within(0.020), written_within(0.0), check_at(8 * GB, 4 * GB)),
    ),
    Case(
        "dict",
        "a 200,000-entry dict made",
        "",
        "d = {{f'key{{i}}': i + {round} for i in range(200_000)}}",
        (committed_within(0.15),),
    ),
    Case(
        "entry",
        "one entry of it changed",
        "d = {f'key{i}': i for i in range(200_000)}",
        "d['key7'] = -{round}",
        (committed_within(0.15),),
    ),
    Case(
        "array",
        "an 80 MB array made",
        "import numpy as np",
        "made = np.random.default_rng({round}).random(10_000_000)",
        (committed_within(0.08),),
        warm=2,
    ),
    Case(
        "model",
        "a 500 MB torch model after a training cell",
        """import torch
torch.manual_seed(0)
torch.set_num_threads(2)
model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(30)])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batch = torch.randn(8, 2048)""",
        """loss = torch.nn.functional.mse_loss(model(batch), batch)
loss.backward()
optimizer.step()
optimizer.zero_grad()
print(loss.item())""",
        (to_standby_at(GB),),
        rounds=10,
        warm=2,
    ),
)
"""A reading cell may write its own small results (`s`): those stand in the entry and count as nothing written."""
