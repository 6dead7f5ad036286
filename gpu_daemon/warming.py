"""How many spares (started, unassigned replicas) a host keeps of each image, without IO: what happens comes in, which
to make and which to drop goes out.

Guarantees: never more than `most` spares, those in the making counted; none is made while memory is short, and then
spares go at once, those of the images least asked for first; a spare is dropped for want of demand only after it was
too many for `calm` seconds, so that a pause between two notebooks drops none; making that fails is tried again after
a pause that doubles; a start has the machine for itself for `head_start` seconds before what it took is made again,
however many more starts come meanwhile. By demand, as many are kept as starts arrive until one that was taken is made
again (Little's law: rate × seconds), with so many more that an arrival finds one with the stated confidence, if
arrivals are independent (Poisson).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

FIRST_PAUSE = 1.0
LAST_PAUSE = 300.0
POPULAR = 0.35
"""Starts that still count (each counts for less with time) at which an image is kept warm: one start within about a
window."""
SIZE_UNKNOWN = 128 << 20
SECONDS_UNKNOWN = 2.0
LEARN = 0.3
"""Weight of the newest measurement."""


@dataclass(frozen=True)
class Policy:
    """kind: `fixed`: `keep` of each popular image; `demand`: by demand, and at least `keep`; `off`: none.

    images: those that are always popular. most: of all images together. confidence: of finding a spare. window:
    seconds over which starts are counted. calm, head_start: see above. reserve: bytes of the host's memory that spares
    leave free.
    """

    kind: Literal["off", "fixed", "demand"] = "demand"
    keep: int = 1
    most: int = 4
    images: tuple[str, ...] = ("",)
    confidence: float = 0.95
    window: float = 600.0
    calm: float = 60.0
    reserve: int = 1 << 30
    head_start: float = 0.0


@dataclass(frozen=True)
class Arrived:
    """A replica of this image is to be started; whether a spare was there does not matter."""

    image: str
    now: float


@dataclass(frozen=True)
class Made:
    """A spare that was asked for waits. seconds: that it took; size: bytes of its own, 0: not known."""

    image: str
    seconds: float
    size: int
    now: float


@dataclass(frozen=True)
class Failed:
    """A spare that was asked for did not come up."""

    image: str
    now: float


@dataclass(frozen=True)
class Gone:
    """A waiting spare is there no more: it became a replica, or it ended."""

    image: str
    now: float


@dataclass(frozen=True)
class Found:
    """Spares that were made before the daemon's restart wait, at most `most`: image and size (as in `Made`) of each."""

    spares: tuple[tuple[str, int], ...]
    now: float


@dataclass(frozen=True)
class Expected:
    """Replicas of exactly these images may be asked for soon: each is kept as if somebody had asked already."""

    images: frozenset[str]
    now: float


@dataclass(frozen=True)
class Memory:
    """What the host has left, in bytes. Told every few seconds: it also stands for the clock."""

    available: int
    now: float


@dataclass(frozen=True)
class Tick:
    """`due` has come."""

    now: float


Event = Arrived | Made | Failed | Gone | Found | Expected | Memory | Tick


@dataclass(frozen=True)
class Make:
    """`Made` or `Failed` must follow."""

    image: str


@dataclass(frozen=True)
class Drop:
    """One waiting spare is to end; it counts no more."""

    image: str


Instruction = Make | Drop


@dataclass
class _Image:
    ready: int = 0
    making: int = 0
    weight: float = 0.0
    """Starts, each counting e^(-age / window)."""
    weighed: float = 0.0
    seconds: float = SECONDS_UNKNOWN
    size: int = SIZE_UNKNOWN
    measured: bool = False
    failures: int = 0
    not_before: float = -math.inf
    rests_until: float = -math.inf
    """Until then a start has the machine for itself."""
    surplus_since: float | None = None

    @property
    def held(self) -> int:
        return self.ready + self.making


@dataclass
class Warming:
    policy: Policy
    short: bool = False
    """Whether memory is short; spares are not made then."""
    _images: dict[str, _Image] = field(default_factory=dict)
    _expected: frozenset[str] = frozenset()
    _eased: float | None = None
    """Since when memory is no longer short, while spares wait for it to stay so."""
    _room: float = math.inf
    """Bytes that spares may still take."""
    _story: deque[Event | Instruction] = field(default_factory=lambda: deque(maxlen=60))

    def __post_init__(self) -> None:
        if self.policy.kind != "off":
            self._images = {image: _Image() for image in self.policy.images}

    def handle(self, event: Event) -> list[Instruction]:
        self._story.append(event)
        match event:
            case Arrived(image, now):
                known = self._images.setdefault(image, _Image(weighed=now))
                known.weight, known.weighed = self._weight(known, now) + 1.0, now
                if now >= known.rests_until:
                    # Not put off further by each start: a rush would have none made.
                    known.rests_until = now + self.policy.head_start
            case Made(image, seconds, size, _):
                self._on_made(self._known(image), seconds, size)
            case Failed(image, now):
                known = self._known(image)
                known.making -= 1
                known.failures += 1
                known.not_before = now + min(FIRST_PAUSE * 2.0 ** min(known.failures - 1, 20), LAST_PAUSE)
            case Gone(image, _):
                self._known(image).ready -= 1
            case Found(spares, now):
                for image, size in spares:
                    self._on_found(self._images.setdefault(image, _Image(weighed=now)), size)
            case Expected(images, now):
                self._expected = images
                for image in images:
                    self._images.setdefault(image, _Image(weighed=now))
            case Memory(available, now):
                self._on_memory(available, now)
        out = self._settle(event.now)
        self._story.extend(out)
        self.validate_state()
        return out

    def due(self, now: float) -> float | None:
        """When to tell `Tick`, at the latest; None when nothing waits for the clock but what `Memory` is enough for."""
        rests = [known.rests_until for known in self._images.values() if known.rests_until > now]
        return min(rests, default=None)

    def ready(self, image: str) -> int:
        return self._images[image].ready if image in self._images else 0

    def images(self) -> list[str]:
        """Those that are kept warm, or were: some spare of them may wait."""
        return sorted(self._images)

    def wanted(self, image: str, now: float) -> int:
        """How many are to be kept now, all bounds counted."""
        return self._targets(now).get(image, 0)

    def validate_state(self) -> None:
        held = sum(known.held for known in self._images.values())
        low = any(known.ready < 0 or known.making < 0 for known in self._images.values())
        if low or held > self.policy.most:
            raise AssertionError(f"{self._images} breaks most={self.policy.most}; latest: {list(self._story)}")

    # -- events -------------------------------------------------------------------------------------------------------

    def _known(self, image: str) -> _Image:
        if image not in self._images:
            raise AssertionError(f"nothing is known of image {image!r}; latest: {list(self._story)}")
        return self._images[image]

    def _on_made(self, known: _Image, seconds: float, size: int) -> None:
        known.making -= 1
        known.ready += 1
        known.failures, known.not_before = 0, -math.inf
        # The first counts whole; a slow one at once, since what is kept must last for as long.
        weight = LEARN if known.measured and seconds < known.seconds else 1.0
        known.seconds += weight * (seconds - known.seconds)
        if size:
            known.size = size if not known.measured else max(size, round(known.size + LEARN * (size - known.size)))
        known.measured = True

    def _on_found(self, known: _Image, size: int) -> None:
        known.ready += 1
        known.size = max(size, known.size) if size else known.size

    def _on_memory(self, available: int, now: float) -> None:
        self._room = available - self.policy.reserve
        if self._room < 0:
            self.short, self._eased = True, None
        elif self.short and self._eased is None:
            self._eased = now

    # -- what follows -------------------------------------------------------------------------------------------------

    def _settle(self, now: float) -> list[Instruction]:
        if self.short and self._eased is not None and now >= self._eased + self.policy.calm:
            self.short, self._eased = False, None
        out: list[Instruction] = self._squeeze() if self.short else []
        targets = self._targets(now)
        crowded = self._crowded(targets)
        for image in list(self._images):
            out += self._trim(image, targets.get(image, 0), 0.0 if crowded else self.policy.calm, now)
        for image, target in targets.items():
            out += self._make_up(image, target, now)
        self._forget(targets, now)
        return out

    def _squeeze(self) -> list[Instruction]:
        """Spares whose memory the host needs, those least asked for first. What they give back is counted at once."""
        out: list[Instruction] = []
        for image, known in sorted(self._images.items(), key=lambda item: (item[1].weight, item[0])):
            while self._room < 0 and known.ready:
                known.ready -= 1
                self._room += known.size
                out.append(Drop(image))
        return out

    def _crowded(self, targets: dict[str, int]) -> bool:
        """Whether an image has to wait for the spares that another has too many of."""
        held = sum(known.held for known in self._images.values())
        return held >= self.policy.most and any(self._images[i].held < target for i, target in targets.items())

    def _trim(self, image: str, target: int, calm: float, now: float) -> list[Instruction]:
        known = self._images[image]
        if known.held <= target or self.short:
            # Under pressure the squeeze alone decides: what waits and fits may still serve somebody.
            known.surplus_since = None
            return []
        if known.surplus_since is None:
            known.surplus_since = now
        if now < known.surplus_since + calm or not known.ready:
            return []
        surplus = min(known.held - target, known.ready)
        known.ready -= surplus
        known.surplus_since = now if known.held > target else None
        return [Drop(image)] * surplus

    def _make_up(self, image: str, target: int, now: float) -> list[Instruction]:
        known = self._images[image]
        if self.short or now < max(known.not_before, known.rests_until):
            return []
        # After a failure one at a time.
        missing = min(target - known.held, 1 - known.making if known.failures else target)
        room = self.policy.most - sum(other.held for other in self._images.values())
        fitting = math.floor(self._room / max(1, known.size)) if math.isfinite(self._room) else missing
        count = max(0, min(missing, room, fitting))
        known.making += count
        self._room -= count * known.size
        return [Make(image)] * count

    def _forget(self, targets: dict[str, int], now: float) -> None:
        """Images that nobody asks for any more."""
        for image, known in list(self._images.items()):
            always = image in self.policy.images or image in self._expected
            idle = not always and not known.held and not targets.get(image)
            if idle and self._weight(known, now) < POPULAR / 10:
                del self._images[image]

    # -- how many -----------------------------------------------------------------------------------------------------

    def _targets(self, now: float) -> dict[str, int]:
        """How many of each image, those that are expected first, then by their popularity: each gets one before any
        gets its second."""
        wishes = {image: self._wish(image, now) for image in self._images}
        weights = {image: self._weight(known, now) for image, known in self._images.items()}
        order = sorted(wishes, key=lambda image: (image not in self._expected, -weights[image], image))
        given = dict.fromkeys(order, 0)
        left = self.policy.most
        while left and (hungry := [image for image in order if given[image] < wishes[image]]):
            for image in hungry[:left]:
                given[image] += 1
            left -= min(left, len(hungry))
        return {image: count for image, count in given.items() if count}

    def _wish(self, image: str, now: float) -> int:
        policy, known = self.policy, self._images[image]
        weight = self._weight(known, now)
        popular = image in policy.images or image in self._expected or weight >= POPULAR
        if policy.kind == "off" or not popular:
            return 0
        if policy.kind == "fixed":
            return policy.keep
        # From one that is taken to the next that waits.
        seconds = policy.head_start + known.seconds
        return max(policy.keep, enough(weight / policy.window * seconds, policy.confidence, policy.most))

    def _weight(self, known: _Image, now: float) -> float:
        return known.weight * math.exp(-max(0.0, now - known.weighed) / self.policy.window)


def enough(mean: float, confidence: float, most: int) -> int:
    """The least number of spares that an arrival finds not all taken with this confidence, `most` at most.

    mean: arrivals while one spare is made (Little's law). Each that was taken is being made again, so that an arrival
    finds one unless as many as there are came within that time: P(Poisson(mean) < number) ≥ confidence.
    """
    if mean <= 0:
        return 0
    term = total = math.exp(-min(mean, 700.0))
    number = 1
    while total < confidence and number < most:
        term *= mean / number
        total += term
        number += 1
    return min(number, most)
