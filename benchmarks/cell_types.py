"""Twenty types of notebook cells for `benchmarks/rightsizing.py`: what their kernels are on the simulated device.

Source of the mix: made up for this benchmark. The kinds are GEMM, attention, memory-bound operations and small
networks, and what notebooks do around them; how much of each kind's time is spread over TPCs (m), is not (b), or fills
only some (width) is ours, chosen within these bounds: GEMM and attention on large inputs scale almost perfectly; a
kernel of w blocks fills w/2 TPCs; memory-bound kernels saturate the bandwidth with about half of the TPCs; small
networks wait for their launches (b, some 5 to 10 µs a kernel). LithOS reports 26 % of capacity saved at about 4 % of
throughput on its own models (SOSP'25, arXiv 2504.15465).

Times are in milliseconds on all 66 TPCs; the noise is log-normal with the given sigma, and two runs in a hundred take
1.5 to 4 times as long (a page fault, a slow disk). Four types do not follow m/t + b at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from nbos_cluster.simdevice import Kernel
from nbos_cluster.simdevice.parameters import HOPPER_TPCS

OUTLIERS = 0.02


@dataclass(frozen=True)
class CellType:
    """phases: kernels that follow each other, once an execution. odd: what the model does not know, a factor on the
    duration that depends on the TPCs and on how many executions there were."""

    name: str
    phases: tuple[Kernel, ...]
    asked: int = HOPPER_TPCS
    noise: float = 0.01
    odd: Callable[[int, int, Random], float] | None = None

    def disturb(self, seconds: float, tpcs: int, run: int, random: Random) -> float:
        """What the execution takes where the model's duration is `seconds`."""
        if self.odd is not None:
            seconds *= self.odd(tpcs, run, random)
        seconds *= random.lognormvariate(0, self.noise)
        return seconds * random.uniform(1.5, 4) if random.random() < OUTLIERS else seconds


def wide(ms: float) -> Kernel:
    """Spreads over all TPCs."""
    return Kernel(m=ms / 1000 * HOPPER_TPCS)


def narrow(ms: float, width: int) -> Kernel:
    """Fills `width` TPCs."""
    return Kernel(m=ms / 1000 * width, width=width)


def fixed(ms: float) -> Kernel:
    """Launches, small kernels, the host's share: no faster with more TPCs."""
    return Kernel(m=0.0, b=ms / 1000)


def _cliff(tpcs: int, run: int, random: Random) -> float:
    return 1.6 if tpcs < 40 else 1.0


def _waves(tpcs: int, run: int, random: Random) -> float:
    """Whole waves of 132 blocks: steps instead of a curve."""
    return -(-132 // tpcs) / (132 / tpcs)


def _random(tpcs: int, run: int, random: Random) -> float:
    return random.uniform(0.5, 2.0)


def _changes(tpcs: int, run: int, random: Random) -> float:
    """From the thirtieth execution on, somebody else's batch size: four times the work."""
    return 1.0 if run < 30 else 4.0


CELLS = (
    CellType("GEMM 8192, bf16", (wide(900), fixed(5))),
    CellType("GEMM 1024, many", (narrow(400, 32), fixed(40))),
    CellType("attention, 16k tokens", (wide(1200), fixed(20))),
    CellType("attention, 1k tokens, batch 2", (narrow(300, 48), fixed(30)), noise=0.02),
    CellType("element-wise, 1 GB arrays", (narrow(600, 34), fixed(5))),
    CellType("reduction, 1 GB array", (narrow(500, 30), fixed(20)), noise=0.02),
    CellType("decode, batch 1, 7B", (narrow(2000, 36), fixed(400))),
    CellType("decode, batch 32, 7B", (narrow(1500, 40), wide(900), fixed(300))),
    CellType("ResNet-50 training, batch 256", (wide(4000), fixed(150)), noise=0.02),
    CellType("ResNet-18 training, batch 32", (wide(300), fixed(700)), noise=0.02),
    CellType("MLP training, 3 layers", (wide(20), fixed(1500)), noise=0.03),
    CellType("LSTM training, batch 64", (narrow(200, 12), fixed(1800)), noise=0.02),
    CellType("GNN training, sampled", (wide(150), fixed(2000)), noise=0.03),
    CellType("k-means, 10 M points", (wide(250), fixed(150)), asked=33),
    CellType("gradient boosting", (narrow(700, 20), fixed(900)), noise=0.03),
    CellType("data frame join", (narrow(350, 26), fixed(650)), noise=0.05),
    CellType("GEMM in waves of blocks", (wide(800), fixed(10)), odd=_waves),
    CellType("working set leaves the L2", (wide(60), fixed(800)), odd=_cliff),
    CellType("waits for a web server", (wide(100), fixed(500)), odd=_random),
    CellType("batch size changes in between", (wide(40), fixed(600)), noise=0.02, odd=_changes),
)
