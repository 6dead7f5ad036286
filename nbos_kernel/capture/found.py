"""What a comparison of the namespace with the log finds: the values that pass between the parts of the capture.

Guarantees: nothing here changes by itself; `why_not` gives one line of text for every exception, however it behaves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .buffers import FrameData, Marks

NOT_LOOKED_INTO = "not looked into yet"
NOT_COMPARED = "not compared with the log on this replica yet"


@dataclass(frozen=True)
class Packed:
    """Variables pickled together. The digest covers names, stream and buffers."""

    names: tuple[str, ...]
    digest: str
    frames: tuple[FrameData, ...]
    anew: bool = False
    """The store has lost blobs of it, nobody knows which: all of them have to be put."""
    known: bool = False
    """The log has it as it is."""

    @property
    def size(self) -> int:
        return sum(frame.size for frame in self.frames)

    @property
    def fresh(self) -> int:
        """Bytes in chunks that were not there before."""
        return sum(frame.fresh for frame in self.frames)


@dataclass
class Unit:
    """Variables that are examined together, as they were when the log last agreed with them."""

    names: tuple[str, ...]
    identities: dict[str, int]
    digest: str = ""
    marks: tuple[Marks, ...] = ()
    exposed: str = NOT_LOOKED_INTO
    mentions: frozenset[str] | None = None
    functions: frozenset[int] = frozenset()
    """The notebook's functions in it, by identity."""
    skip: int = 0
    """Examinations to come that need no new look into it: one that stays exposed is looked into ever more rarely."""
    patience: int = 1
    in_vain: int = 0
    """Examinations in a row though no code named it, for want of a look into it."""
    compared: bool = True
    """False: it was loaded from the log by code that may make another value here (`loaded.py`)."""
    device: bool = False
    """Whether something in it lies on a GPU, or belongs there."""

    @property
    def size(self) -> int:
        return sum(marks.size for marks in self.marks)


@dataclass
class Changes:
    """What has to be written: components anew or changed, names gone, names that newly cannot be replicated.

    `units`: how the examined variables stand now; `atoms`, `settings`: all that are compared by value; `again`: names
    that the next capture has to examine, because they found no room in this entry.
    """

    components: list[Packed] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    atoms: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    again: set[str] = field(default_factory=set)
    examined: int = 0

    def __bool__(self) -> bool:
        return bool(self.components or self.deleted or self.lost)


def why_not(err: BaseException, value: Any) -> str:
    """One line that tells the user what kind of value it is and why it stays behind."""
    kind = type(value).__qualname__
    if isinstance(err, RecursionError) or isinstance(err.__cause__, RecursionError):
        return f"{kind}: nested too deeply to be pickled"
    if isinstance(err, MemoryError):
        return f"{kind}: not enough memory to pickle it"
    try:
        text = str(err).strip().splitlines()
    except Exception:  # noqa: BLE001 - the user's exception may fail to print itself
        text = []
    reason = f"{kind}: {text[0] if text else type(err).__name__}"[:300]
    return reason.encode("utf-8", "replace").decode()
