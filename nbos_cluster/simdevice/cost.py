"""How long a kernel takes on t TPCs: l(t) = m/t + b, LithOS' model (SOSP'25, section on right-sizing)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """m: TPC-seconds of work that spreads over TPCs. b: seconds that do not get shorter with more of them.

    sensitivity: how much slower it becomes at the clock f: by sensitivity * (f_max/f - 1). LithOS' s: 1 where only
    computing counts, 0 where it waits for memory.
    width: the most TPCs that its blocks can fill (LithOS: blocks / blocks per TPC, rounded up), 0: any number.
    """

    m: float
    b: float = 0.0
    width: int = 0
    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        if min(self.m, self.b, self.width, self.sensitivity) < 0 or self.m + self.b <= 0:
            raise ValueError(f"a kernel takes some time: m and b are not negative and not both 0, got {self}")

    def usable(self, tpcs: float) -> float:
        """Of `tpcs` those that the kernel fills."""
        return min(tpcs, self.width) if self.width else tpcs

    def seconds(self, tpcs: float, clock: float = 1.0) -> float:
        """Its duration while it has `tpcs` TPCs at this part of the highest clock; infinite with none."""
        usable = self.usable(tpcs)
        slower = 1 + self.sensitivity * (1 / clock - 1)
        return slower * (self.m / usable + self.b) if usable > 0 else float("inf")
