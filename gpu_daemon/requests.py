"""What a replica may ask, read and checked. No IO. A replica runs user code: nothing in a message is taken on trust."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from nbos_cluster.records import Ports, Resources
from nbos_cluster.wire import Message

MAX_NUMBER = 10**12
MAX_TEXT = 4096
MAX_LOST = 10_000
MAX_LACKS = 200
MAX_LACKS_TEXT = 300
MAX_CODE = 64
MAX_IMPORTED = 100
MAX_MODULE = 200
MAX_SECONDS = 1e8
MAX_MEMORY = 1 << 60
MAX_DEVICES = 256


class RequestError(ValueError):
    """The request breaks the protocol; says which field and how. `code` is what `error` says in the reply."""

    def __init__(self, text: str, code: str = "malformed") -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class HelloRequest:
    format: int
    nbos: str
    pid: int
    python: str
    ip: str
    ports: Ports | None
    applied: int
    running: tuple[int, int] | None
    """n and token of the execution it runs, or has run without an answer to its append."""


@dataclass(frozen=True)
class BidRequest:
    n: int
    attempt: int
    kind: Literal["cell", "sync", "touch"]
    """touch: it has its claim, runs, and asks for a grant only now (`touch`)."""
    resources: Resources
    wait: bool
    applied: int
    code: str = ""
    """Fingerprint of what the cell does; '' where it must get exactly what it asks for."""
    away: int = 0
    """Bytes that come from host memory to the device before its first line."""
    borrow: int | None = None
    """TPCs beyond `resources` that it could use on loan; -1: nothing is to be lent to it; None: the replica does not
    know how to give back."""
    touch: Resources | None = None
    """What the cell will ask for when it first needs a GPU, if it may begin without one; then `resources` are none."""


@dataclass(frozen=True)
class Took:
    """How long an execution took: seconds of a step or of the cell, as `unit` says; whole: of the cell."""

    seconds: float
    unit: Literal["cell", "step"]
    whole: float


def hello(message: Message) -> HelloRequest:
    running = message.get("running")
    if running is not None and not isinstance(running, dict):
        raise RequestError("running must be null or an object with n and token")
    raw = message.get("ports")
    ports = None
    if raw is not None:
        if not isinstance(raw, dict):
            raise RequestError("ports must be an object")
        ports = Ports(**{name: number(raw, name, most=65535) for name in Ports.__struct_fields__})
    return HelloRequest(
        format=number(message, "format") if message.get("format") is not None else 1,
        nbos=text(message, "nbos", ""),
        pid=number(message, "pid"),
        python=text(message, "python", ""),
        ip=text(message, "ip", ""),
        ports=ports,
        applied=number(message, "applied", least=-1),
        running=(number(running, "n"), number(running, "token", most=1 << 62)) if running is not None else None,
    )


def bid(message: Message) -> BidRequest:
    kind = text(message, "kind", "cell")
    if kind not in ("cell", "sync"):
        raise RequestError(f"kind must be cell or sync, not {kind[:40]!r}")
    return BidRequest(
        n=number(message, "n", least=1),
        attempt=number(message, "attempt", default=1),
        kind=cast(Literal["cell", "sync"], kind),
        resources=resources(message.get("resources")),
        wait=flag(message, "wait"),
        applied=number(message, "applied", least=-1),
        code=text(message, "code", "")[:MAX_CODE],
        away=number(message, "away", default=0, most=MAX_MEMORY),
        borrow=borrow(message),
        touch=resources(message["touch"]) if message.get("touch") is not None else None,
    )


@dataclass(frozen=True)
class GaveBack:
    """left: bytes of its process by device. away: in host memory, for the next cell. moved: bytes that went there now,
    in so many seconds. stays: why something is left."""

    left: dict[str, int]
    away: int
    moved: int
    stays: str
    seconds: float


def gave_back(message: Message) -> GaveBack:
    seconds = message.get("seconds")
    return GaveBack(
        left=left(message) or {},
        away=number(message, "away", default=0, most=MAX_MEMORY),
        moved=number(message, "moved", default=0, most=MAX_MEMORY),
        stays=text(message, "stays", "")[:MAX_LACKS_TEXT],
        seconds=seconds if isinstance(seconds, float) and 0 <= seconds < MAX_SECONDS else 0.0,
    )


def left(message: Message, name: str = "left") -> dict[str, int] | None:
    """Bytes by device; None where it does not say. A device that this host does not have is nobody's business."""
    raw = message.get(name)
    if raw is None:
        return None
    if not isinstance(raw, dict) or len(raw) > MAX_DEVICES:
        raise RequestError(f"{name} must be an object of at most {MAX_DEVICES} devices")
    return {str(uuid)[:MAX_CODE]: number(raw, uuid, most=MAX_MEMORY) for uuid in raw}


def touch(message: Message) -> tuple[BidRequest, int]:
    """A running cell's request for a grant, and the token of its claim."""
    n, asked = number(message, "n", least=1), resources(message.get("resources"))
    if not asked.wants_gpu:
        raise RequestError("a touch asks for GPUs or TPCs")
    code = text(message, "code", "")[:MAX_CODE]
    away = number(message, "away", default=0, most=MAX_MEMORY)
    request = BidRequest(n, 1, "touch", asked, True, n - 1, code, away, borrow(message))
    return request, number(message, "token", most=1 << 62)


def borrow(message: Message) -> int | None:
    return number(message, "borrow", least=-1) if message.get("borrow") is not None else None


def took(message: Message) -> Took | None:
    """Of `release`; None where the replica measured nothing, or says what cannot be."""
    raw = message.get("took")
    if not isinstance(raw, dict):
        return None
    seconds, whole, unit = raw.get("seconds"), raw.get("whole"), raw.get("unit")
    if not (isinstance(seconds, float) and isinstance(whole, float) and 0 < seconds <= whole < MAX_SECONDS):
        return None
    return Took(seconds, cast(Literal["cell", "step"], unit), whole) if unit in ("cell", "step") else None


def resources(raw: object) -> Resources:
    if raw is None:
        return Resources()
    if not isinstance(raw, dict):
        raise RequestError("resources must be an object with gpus, tpcs, memory and model")
    unknown = set(raw) - set(Resources.__struct_fields__)
    if unknown:
        raise RequestError(f"resources has an unknown field {sorted(unknown)[0][:40]!r}")
    return Resources(
        gpus=number(raw, "gpus", default=0),
        tpcs=number(raw, "tpcs", default=0),
        memory=number(raw, "memory", default=0, most=1 << 60),
        model=text(raw, "model", ""),
    )


def number(message: Message, name: str, *, default: int | None = None, least: int = 0, most: int = MAX_NUMBER) -> int:
    value = message.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError(f"{name} must be a whole number from {least} to {most}, not {str(value)[:40]!r}")
    return value


def text(message: Message, name: str, default: str | None = None) -> str:
    value = message.get(name, default)
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise RequestError(f"{name} must be a text of at most {MAX_TEXT} characters")
    # A lone surrogate passes JSON but no UTF-8 encoder behind it.
    return value.encode("utf-8", "replace").decode()


def texts(message: Message, name: str, most: int) -> list[str]:
    value = message.get(name)
    if not isinstance(value, list) or len(value) > most or not all(isinstance(item, str) for item in value):
        raise RequestError(f"{name} must be a list of at most {most} texts")
    return value


def flag(message: Message, name: str) -> bool:
    value = message.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false")
    return value


def lost(message: Message) -> dict[str, str]:
    raw = message.get("lost") or {}
    if not isinstance(raw, dict) or len(raw) > MAX_LOST:
        raise RequestError(f"lost must be an object of at most {MAX_LOST} names")
    return {str(name)[:MAX_TEXT]: text(raw, name) for name in raw}


def lacks(message: Message) -> list[str]:
    """Names that can stand in the replica's record; a longer one is no name that helps anybody there."""
    raw = texts(message, "lacks", most=MAX_LACKS) if "lacks" in message else []
    return [text({"lacks": name}, "lacks") for name in raw if len(name) <= MAX_LACKS_TEXT]


def imported(message: Message) -> tuple[str, ...]:
    """Modules that the replica's cells imported. What cannot be a module's name is left out: nothing depends on it."""
    raw = message.get("imported")
    names = [name for name in raw if isinstance(name, str)] if isinstance(raw, list) else []
    return tuple(
        n for n in names[:MAX_IMPORTED] if len(n) <= MAX_MODULE and all(p.isidentifier() for p in n.split("."))
    )
