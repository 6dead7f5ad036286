"""How long a kernel takes on t TPCs: l(t) = m/t + b, LithOS' model (SOSP'25, section on right-sizing)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """m: TPC-seconds of work that spreads over TPCs. b: seconds that do not get shorter with more of them.

    width: the most TPCs that its blocks can fill (LithOS: blocks / blocks per TPC, rounded up), 0: any number.
    """

    m: float
    b: float = 0.0
    width: int = 0

    def __post_init__(self) -> None:
        if min(self.m, self.b, self.width) < 0 or self.m + self.b <= 0:
            raise ValueError(f"a kernel takes some time: m and b are not negative and not both 0, got {self}")

    def usable(self, tpcs: float) -> float:
        """Of `tpcs` those that the kernel fills."""
        return min(tpcs, self.width) if self.width else tpcs

    def seconds(self, tpcs: float) -> float:
        """Its duration while it has `tpcs` TPCs; infinite with none."""
        usable = self.usable(tpcs)
        return self.m / usable + self.b if usable > 0 else float("inf")
