"""What a cell asks of the GPUs: `%%gpu …` or `%%cpu` in its first line, else its metadata, else the kernel's
default.

    %%gpu 2                     two whole devices
    %%gpu 1 model=H100          a device of a model
    %%gpu tpcs=16 mem=20G       a slice of one device
    %%gpu tpcs=16 exact         never fewer TPCs, whatever was learnt (right-sizing)
    %%gpu tpcs=16 borrow=max    and all that is idle beside them, on loan; borrow=8: at most 8; borrow=no: nothing on
    loan

Pure functions. Errors name the argument and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Resources = dict[str, Any]

NONE: Resources = {"gpus": 0, "tpcs": 0, "memory": 0, "model": ""}
USAGE = "%%gpu [number of devices] [tpcs=N] [mem=SIZE, such as 20G] [model=NAME] [exact] [borrow=N|max|no]"
EXACT = "exact"
BORROW = "borrow"
NOTHING = -1
"""TPCs to borrow: not even those of what the cell asks for that are others' idle quota."""
MAX_GPUS = 64
MAX_TPCS = 512

_FIRST = re.compile(
    r"\A[ \t]*(?:\r?\n[ \t]*)*(?:%%replay[ \t]*\r?\n[ \t]*)?%%(gpu|cpu)(?:[ \t]+([^\r\n]*))?[ \t]*(?=\r?\n|\Z)"
)
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)([kmgt]?)i?b?$", re.IGNORECASE)
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class BadResources(ValueError):
    """The cell asks for something that cannot be meant; says what is allowed."""


def of_cell(code: str, metadata: Mapping[str, Any], default: Mapping[str, Any]) -> Resources:
    """What this cell asks for. Raises BadResources."""
    line = _FIRST.match(code)
    if line is not None:
        return parse(line[1], line[2] or "")
    ours = metadata.get("nbos")
    if ours is None:
        return {**NONE, **default}
    if not isinstance(ours, Mapping):
        raise BadResources(f"the cell's metadata.nbos must be an object, not {ours!r:.60}")
    asked = ours.get("resources")
    if asked is None:
        return {**NONE, **default}
    if not isinstance(asked, Mapping):
        raise BadResources(f"the cell's metadata.nbos.resources must be an object, not {asked!r:.60}")
    return checked(asked)


def covers(held: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a cell that holds `held` may run code that asked for `asked`. A whole device covers a slice."""
    if not (asked.get("gpus") or asked.get("tpcs")):
        return True
    devices = int(held.get("gpus", 0))
    if asked.get("model") and held.get("model") != asked["model"]:
        return False
    if devices:
        return devices >= int(asked.get("gpus", 0))
    least = (int(asked.get(key, 0)) for key in ("gpus", "tpcs", "memory"))
    return all(int(held.get(key, 0)) >= wanted for key, wanted in zip(("gpus", "tpcs", "memory"), least, strict=True))


def in_first_line(code: str) -> bool:
    """Whether the cell says itself what it asks for: then its magic explains what is wrong with that."""
    return _FIRST.match(code) is not None


def says(code: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the cell says itself what it asks for, in its first line or its metadata."""
    ours = metadata.get("nbos")
    return in_first_line(code) or (isinstance(ours, Mapping) and ours.get("resources") is not None)


def exact(code: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the cell wants all that it asks for, though less would do."""
    line = _FIRST.match(code)
    if line is not None:
        return EXACT in (line[2] or "").split()
    ours = metadata.get("nbos")
    return isinstance(ours, Mapping) and ours.get(EXACT) is True


def borrow(code: str, metadata: Mapping[str, Any]) -> int:
    """How many TPCs beyond what it asks for the cell can use on loan; NOTHING: it keeps what it gets until it ends.
    Raises BadResources."""
    line = _FIRST.match(code)
    if line is not None:
        said = [word.partition("=")[2] for word in (line[2] or "").split() if word.partition("=")[0] == BORROW]
        return _borrow(said[-1]) if said else 0
    ours = metadata.get("nbos")
    asked = ours.get(BORROW, 0) if isinstance(ours, Mapping) else 0
    return _borrow(asked)


def _borrow(value: object) -> int:
    if value in ("max", True):
        return MAX_TPCS
    if value == "no" or value is False:
        return NOTHING
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or not 0 <= number <= MAX_TPCS:
        raise BadResources(f"borrow must be max, no, or a number of TPCs from 0 to {MAX_TPCS}, got {value!r:.60}")
    return number


def blank_first_line(code: str) -> str:
    """The cell with a valid `%%gpu`/`%%cpu` line emptied, so that line numbers in tracebacks stay right."""
    line = _FIRST.match(code)
    if line is None:
        return code
    try:
        parse(line[1], line[2] or "")
    except BadResources:
        return code  # left standing: the magic of that name explains what is wrong
    return "\n" * code[: line.end()].count("\n") + code[line.end() :]


def parse(magic: str, arguments: str) -> Resources:
    """The resources of one `%%gpu` or `%%cpu` line. Raises BadResources."""
    words = arguments.split()
    if magic == "cpu":
        if words:
            raise BadResources(f"%%cpu takes no arguments, got {arguments.strip()!r}")
        return dict(NONE)
    asked: dict[str, Any] = {}
    borrows = False
    for word in words:
        if word == EXACT:
            continue
        if word.startswith(f"{BORROW}="):
            _borrow(word.partition("=")[2])
            borrows = True
            continue
        key, equals, value = word.partition("=")
        if not equals:
            key, value = "gpus", word
        key = {"mem": "memory", "gpu": "gpus", "tpc": "tpcs"}.get(key, key)
        if key not in NONE:
            raise BadResources(f"%%gpu does not know {key!r}; usage: {USAGE}")
        if key in asked:
            raise BadResources(f"%%gpu got {key!r} twice; usage: {USAGE}")
        asked[key] = _memory(value) if key == "memory" else value if key == "model" else _number(key, value)
    if not asked.get("gpus") and not asked.get("tpcs"):
        if "gpus" in asked or "tpcs" in asked:
            raise BadResources(f"%%gpu asks for nothing; use %%cpu for a cell without GPUs, or {USAGE}")
        asked["gpus"] = 1
    if borrows and not asked.get("tpcs"):
        raise BadResources(f"%%gpu: only a slice borrows; ask for one with tpcs=N, or leave out borrow; usage: {USAGE}")
    try:
        return checked(asked)
    except BadResources as err:
        raise BadResources(f"%%gpu: {err}") from None


def checked(asked: Mapping[str, Any]) -> Resources:
    """`asked` completed and checked. Raises BadResources that names the limit."""
    unknown = set(asked) - set(NONE)
    if unknown:
        raise BadResources(
            f"unknown resources {', '.join(sorted(map(str, unknown)))}; known: gpus, tpcs, memory, model"
        )
    full = {**NONE, **asked}
    for key, most in (("gpus", MAX_GPUS), ("tpcs", MAX_TPCS), ("memory", 2**50)):
        value = full[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise BadResources(f"{key} must be a whole number from 0 to {most}, got {value!r}")
    if not isinstance(full["model"], str):
        raise BadResources(f"model must be a text, got {full['model']!r}")
    if full["gpus"] and full["tpcs"]:
        raise BadResources(
            f"a cell asks either for whole devices or for a slice, not for {full['gpus']} devices and "
            f"{full['tpcs']} TPCs; leave one of them out"
        )
    return full


def size(text: str) -> int:
    """Bytes in a size such as 512M, 20G or 1.5GiB. Raises BadResources."""
    match = _SIZE.match(text)
    if match is None:
        raise BadResources(f"{text!r} is no size; write it like 512M or 20G")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _memory(text: str) -> int:
    try:
        return size(text)
    except BadResources as err:
        raise BadResources(f"%%gpu: mem: {err}; usage: {USAGE}") from None


def _number(key: str, text: str) -> int:
    if not text.isdecimal():
        raise BadResources(f"%%gpu: {key} must be a whole number, got {text!r}; usage: {USAGE}")
    return int(text)
