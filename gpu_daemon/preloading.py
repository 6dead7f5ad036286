"""Which modules a host imports ahead of its replicas, without IO: what its kernels import, what a trial of each module
found and what memory there is comes in; which to try and what to build a warm parent of goes out.

Guarantees: only modules that passed their trial in the environment as it is now are ever built from, at most `most`
of them, of at most `memory` bytes together, and only while the host has that and `reserve` to spare; one trial and one
build at a time, builds at least `calm` seconds apart, those that fail with a pause that doubles; a module that did not
pass, or made a build useless, is left out alone until the environment changes, and said with its reason.

A module counts by kernels, not by imports: its share is the weight of the kernels that imported it, of all of the
latest KERNELS that imported anything; the latest weighs 1, each before it FADE of that. One kernel that says nothing
about others is counted in as well, so that on a new host the first notebook teaches with a share of a half: enough
to begin with, and gone after a few kernels that do without. No owner has more than `PER_OWNER` of the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KERNELS = 40
PER_OWNER = 12
FADE = 0.95
UNSAID = 1.0
"""Weight of the kernel that is counted in and imports nothing."""
ENOUGH = 0.3
STAY = 0.15
"""Shares from which a module is imported ahead, and below which it is no more."""
PER_KERNEL = 100
"""Modules that are remembered of one kernel."""
TOLD = 20
"""Refused modules that are told, with their reasons: they stand in the host's record."""
WORTH = 0.003
"""Seconds that a module's import takes at least, to be worth it."""
FIRST_PAUSE, LAST_PAUSE = 5.0, 600.0
QUIET = 8.0
"""Seconds without a change of the environment before anything is tried in it: an installation takes a while."""
IDLE = 0.5
"""Cores that nobody uses, from which on modules are tried and parents built: cells go first."""
EASED = 60.0
"""Seconds after memory was short before anything is built that takes some."""


@dataclass(frozen=True)
class Policy:
    """learn: whether anything is. most, memory: modules, and bytes, of what is learnt at most; reserve: bytes that the
    host must have left besides; calm: seconds from one build to the next at least; settle: seconds after something
    new before it is tried, since the next cells may import more; patience: seconds after which things are tried and
    built on a busy host as well."""

    learn: bool = True
    most: int = 24
    memory: int = 512 << 20
    reserve: int = 1 << 30
    calm: float = 20.0
    settle: float = 5.0
    patience: float = 300.0


@dataclass(frozen=True)
class Imported:
    """Cells of this kernel imported these modules, which are installed in the environment (as its replica says)."""

    kernel: str
    owner: str
    modules: tuple[str, ...]
    now: float


@dataclass(frozen=True)
class Judged:
    """A module's trial is over. reason: why it is not to be imported ahead, '' where it passed. seconds of processor
    time, bytes: of what the trial had not imported before."""

    module: str
    reason: str
    seconds: float
    size: int
    now: float


@dataclass(frozen=True)
class TrialOver:
    """Of those that were to be tried, these were not reached. trouble: it could not be carried out."""

    now: float
    trouble: str = ""


@dataclass(frozen=True)
class Built:
    """Replicas are forked from a parent with these modules from now on. failed: those that it could not import."""

    modules: tuple[str, ...]
    failed: Mapping[str, str]
    now: float


@dataclass(frozen=True)
class NotBuilt:
    """The build failed. culprit: the module that made it so, '' where that is not known."""

    reason: str
    culprit: str
    now: float


@dataclass(frozen=True)
class Gone:
    """The parent with learnt modules ended: what is forked now has none."""

    now: float


@dataclass(frozen=True)
class Look:
    """Every few seconds. available: memory the host has left; environment: changes with what is installed; idle: cores
    that nobody used since the last one."""

    available: int
    environment: str
    now: float
    idle: float = 1.0


Event = Imported | Judged | TrialOver | Built | NotBuilt | Gone | Look


@dataclass(frozen=True)
class Try:
    """`Judged` for each that is reached, then `TrialOver`, must follow."""

    modules: tuple[str, ...]


@dataclass(frozen=True)
class Build:
    """`Built` or `NotBuilt` must follow. No modules: as if nothing had been learnt."""

    modules: tuple[str, ...]


Instruction = Try | Build


@dataclass
class _Kernel:
    kernel: str
    owner: str
    modules: list[str]


@dataclass
class Preloading:
    """fixed: modules that are imported ahead anyway."""

    policy: Policy
    fixed: frozenset[str] = frozenset()
    built: tuple[str, ...] = ()
    """What replicas that are forked now have imported."""
    dirty: bool = False
    """Whether what is learnt changed since it was `saved`."""
    _kernels: list[_Kernel] = field(default_factory=list)
    """The latest last."""
    _verdicts: dict[str, Judged] = field(default_factory=dict)
    _environment: str | None = None
    _stale: bool = False
    """Whether the environment has changed since the parent was built."""
    _available: int = 0
    _idle: float = 0.0
    _put_off: float | None = None
    """Since when something waits for the host to be less busy."""
    _trying: tuple[str, ...] = ()
    _void: bool = False
    """Whether the environment has changed since the trial began."""
    _building: tuple[str, ...] | None = None
    _failures: int = 0
    _not_before: float = -math.inf
    _try_not_before: float = -math.inf
    _short_until: float = -math.inf

    def handle(self, event: Event) -> list[Instruction]:
        match event:
            case Imported():
                self._on_imported(event)
            case Judged(module):
                if not self._void:
                    self._verdicts[module] = event
            case TrialOver(now, trouble):
                self._trying, self._void = (), False
                if trouble:
                    self._try_not_before = now + LAST_PAUSE / 10
            case Built():
                self._on_built(event)
            case NotBuilt(reason, culprit, now):
                self._on_not_built(reason, culprit, now)
            case Gone(_):
                self.built = ()
            case Look():
                self._on_look(event)
        out = self._settle(event.now)
        self.validate_state()
        return out

    # -- what is told of it -------------------------------------------------------------------------------------------

    def shares(self) -> dict[str, float]:
        total, found = UNSAID, dict[str, float]()
        for age, kernel in enumerate(reversed(self._kernels)):
            weight = FADE**age
            total += weight
            for module in kernel.modules:
                found[module] = found.get(module, 0.0) + weight
        return {module: weight / total for module, weight in found.items()}

    def refused(self) -> dict[str, str]:
        """Modules that enough kernels use and that are not imported ahead, with the reason; the most used of them."""
        found = [(-share, module) for module, share in self.shares().items() if share >= ENOUGH]
        verdicts = [self._verdicts[module] for _, module in sorted(found) if module in self._verdicts]
        return {verdict.module: verdict.reason for verdict in [v for v in verdicts if v.reason][:TOLD]}

    def dump(self) -> list[dict[str, Any]]:
        self.dirty = False
        return [{"kernel": one.kernel, "owner": one.owner, "modules": one.modules} for one in self._kernels]

    def load(self, kernels: Iterable[Mapping[str, Any]]) -> None:
        """What `dump` gave. Raises KeyError or TypeError where it is something else."""
        for one in kernels:
            names = [name for name in one["modules"][:PER_KERNEL] if isinstance(name, str)]
            self._kernels.append(_Kernel(str(one["kernel"]), str(one["owner"]), names))
        del self._kernels[:-KERNELS]

    def validate_state(self) -> None:
        for modules in (self._building or (), self.built):
            if len(modules) > self.policy.most or self.fixed & set(modules):
                raise AssertionError(f"{modules} beyond {self.policy}, fixed: {self.fixed}")

    # -- events -------------------------------------------------------------------------------------------------------

    def _on_imported(self, event: Imported) -> None:
        if not self.policy.learn or not event.modules:
            return
        known = next((one for one in self._kernels if one.kernel == event.kernel), None)
        if known is None:
            known = _Kernel(event.kernel, event.owner, [])
            self._kernels.append(known)
            own = [one for one in self._kernels if one.owner == event.owner]
            if len(own) > PER_OWNER:
                self._kernels.remove(own[0])
            del self._kernels[:-KERNELS]
        new = [module for module in dict.fromkeys(event.modules) if module not in known.modules]
        room = PER_KERNEL - len(known.modules)
        known.modules += new[:room]
        if new:
            self.dirty = True
            self._try_not_before = max(self._try_not_before, event.now + self.policy.settle)

    def _on_built(self, event: Built) -> None:
        self.built = tuple(module for module in event.modules if module not in event.failed)
        self._building = None
        self._failures, self._not_before = 0, event.now + self.policy.calm
        for module, reason in event.failed.items():
            self._blame(module, reason, event.now)

    def _on_not_built(self, reason: str, culprit: str, now: float) -> None:
        self._building = None
        self._failures += 1
        self._not_before = now + min(FIRST_PAUSE * 2.0 ** min(self._failures - 1, 20), LAST_PAUSE)
        if culprit:
            self._blame(culprit, reason, now)

    def _on_look(self, event: Look) -> None:
        self._available, self._idle = event.available, event.idle
        if event.available < self.policy.reserve:
            self._short_until = event.now + EASED
        if event.environment != self._environment:
            if self._environment is not None:
                self._stale = True
                self._not_before = max(self._not_before, event.now + QUIET)
                self._try_not_before = max(self._try_not_before, event.now + QUIET)
            self._environment = event.environment
            self._void = bool(self._trying)
            self._verdicts.clear()

    def _blame(self, module: str, reason: str, now: float) -> None:
        self._verdicts[module] = Judged(module, reason or "it cannot be imported", 0.0, 0, now)

    # -- what follows -------------------------------------------------------------------------------------------------

    def _settle(self, now: float) -> list[Instruction]:
        out: list[Instruction] = []
        if not self.policy.learn or self._environment is None:
            return out
        shares = self.shares()
        unknown = [m for m in self._by_share(shares) if m not in self._verdicts][: 2 * self.policy.most]
        idle = not self._trying and self._building is None
        if unknown and idle and now >= max(self._try_not_before, self._short_until) and self._may(now):
            self._trying = tuple(unknown)
            out.append(Try(self._trying))
        if self._trying or self._building is not None or now < self._not_before:
            return out
        wanted = () if now < self._short_until else self._wanted(shares)
        if (set(wanted) != set(self.built) or self._stale) and (not wanted or self._may(now)):
            self._building, self._stale = wanted, False
            out.append(Build(wanted))
        return out

    def _may(self, now: float) -> bool:
        """Whether work may begin now: the host has time for it, or it has waited for long."""
        if self._idle < IDLE and self._put_off is None:
            self._put_off = now
        if self._idle < IDLE and self._put_off is not None and now < self._put_off + self.policy.patience:
            return False
        self._put_off = None
        return True

    def _by_share(self, shares: Mapping[str, float]) -> list[str]:
        enough = [m for m, s in shares.items() if s >= (STAY if m in self.built else ENOUGH) and m not in self.fixed]
        return sorted(enough, key=lambda module: (-shares[module], module))

    def _wanted(self, shares: Mapping[str, float]) -> tuple[str, ...]:
        """Those that save the most first, as far as there is room."""
        passed = [self._verdicts[m] for m in self._by_share(shares) if m in self._verdicts]
        passed = [v for v in passed if not v.reason and (v.seconds >= WORTH or v.module in self.built)]
        passed.sort(key=lambda v: (-shares[v.module] * v.seconds, v.module))
        # What the parent of now takes is not available any more, and will be.
        held = sum(self._verdicts[m].size for m in self.built if m in self._verdicts)
        room = min(self.policy.memory, max(0, self._available - self.policy.reserve + held))
        chosen: list[str] = []
        for verdict in passed[: self.policy.most]:
            if verdict.size <= room:
                chosen.append(verdict.module)
                room -= verdict.size
        return tuple(sorted(chosen))
