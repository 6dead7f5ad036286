"""Values that pickle refuses although all that they hold can be read, and made again from it.

Guarantees: what is made again holds what was read, or the value is refused with the reason: a match is looked for again
and compared; a queue is made anew only while it is empty, a pool of threads only while nothing runs in it; a part of a
buffer is the same part of the same buffer.
"""

from __future__ import annotations

import importlib
import itertools
import pickle
import queue
import re
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from json import scanner
from typing import Any

_c_scanner: Any = getattr(scanner, "c_make_scanner", None)

IDLE_WITHIN = 0.02
"""Seconds in which a thread of a pool that has just ended its work becomes idle."""


def reduce_match(match: re.Match[Any]) -> Any:
    """Never by a way that takes longer than the one that found it: each begins with `match` and `search`."""
    found = match.re, match.string, match.pos, match.endpos, match.regs
    whole = match.span() == (match.pos, match.endpos)
    for method in ("match", "search", "fullmatch" if whole else "finditer"):
        if _same(_find(method, *found), match):
            return find_again, (method, *found)
    raise pickle.PicklingError("a match that cannot be found again in its string")


def find_again(method: str, pattern: re.Pattern[Any], string: Any, pos: int, endpos: int, regs: Any) -> Any:
    match = _find(method, pattern, string, pos, endpos, regs)
    if match is None or match.regs != regs:
        raise ValueError(f"{pattern.pattern!r} is not found where it was")
    return match


def _find(method: str, pattern: re.Pattern[Any], string: Any, pos: int, endpos: int, regs: Any) -> Any:
    if method != "finditer":
        return getattr(pattern, method)(string, pos, endpos)
    matches = itertools.dropwhile(lambda m: m.start() < regs[0][0], pattern.finditer(string, pos, endpos))
    return next(matches, None)


def _same(found: re.Match[Any] | None, match: re.Match[Any]) -> bool:
    return found is not None and (found.regs, found.lastindex, found.pos) == (match.regs, match.lastindex, match.pos)


def reduce_scanner(made: Any) -> Any:
    """What a JSONDecoder reads with."""
    names = ("strict", "object_hook", "object_pairs_hook", "parse_float", "parse_int", "parse_constant")
    return make_scanner, ({name: getattr(made, name) for name in names},)


def make_scanner(options: dict[str, Any]) -> Any:
    return _c_scanner(types.SimpleNamespace(**options))


def reduce_queue(some: Any) -> Any:
    if not some.empty():
        raise pickle.PicklingError("a SimpleQueue with something in it, which can only be taken out")
    return queue.SimpleQueue, ()


def reduce_pool(pool: Any) -> Any:
    """Its threads do not travel: it is a new one of the same kind, which has nothing to do either."""
    if pool._shutdown:
        return ended_pool, ()
    if not _idle(pool):
        raise pickle.PicklingError("a pool of threads with work under way")
    return ThreadPoolExecutor, (pool._max_workers, pool._thread_name_prefix, pool._initializer, pool._initargs)


def _idle(pool: Any) -> bool:
    until = time.monotonic() + IDLE_WITHIN
    while pool._work_queue.empty():
        if pool._idle_semaphore._value == len(pool._threads):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return False


def ended_pool() -> Any:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    return pool


def reduce_memoryview(view: memoryview) -> Any:
    """All of an object, or a part of it without gaps."""
    whole = memoryview(view.obj)
    if all(getattr(whole, it) == getattr(view, it) for it in ("nbytes", "format", "shape", "readonly")):
        return memoryview, (view.obj,)
    if not view.c_contiguous or not whole.c_contiguous or view.readonly != whole.readonly or not view.nbytes:
        raise pickle.PicklingError("a memoryview with gaps, read-only on an object that is not, or of nothing")
    return part_of, (view.obj, _address(view) - _address(whole), view.nbytes, view.format, view.shape)


def part_of(base: Any, start: int, size: int, format: str, shape: tuple[int, ...]) -> memoryview:
    part = memoryview(base).cast("B")[start : start + size]
    return part if format == "B" and len(shape) == 1 else part.cast(format, shape)  # type: ignore[call-overload]


def _address(view: memoryview) -> int:
    try:
        numpy: Any = importlib.import_module("numpy")
    except ImportError:
        raise pickle.PicklingError(
            "a memoryview of a part of an object (numpy would be needed to tell which)"
        ) from None
    return int(numpy.frombuffer(view.cast("B"), "u1").ctypes.data)


def reduce_draw(draw: Any) -> Any:
    """PIL.ImageDraw: a pen on the same image."""
    image = getattr(draw, "_image", None)
    if image is None or image.im is not draw.im:
        raise pickle.PicklingError("a pen of PIL on an image that has other memory by now")
    pen = {name: value for name, value in vars(draw).items() if name not in ("im", "draw", "_image", "palette")}
    return draw_on, (image, draw.mode), pen


def draw_on(image: Any, mode: str) -> Any:
    return importlib.import_module("PIL.ImageDraw").Draw(image, mode)


REDUCERS: dict[type, Callable[[Any], Any]] = {
    re.Match: reduce_match,
    queue.SimpleQueue: reduce_queue,
    ThreadPoolExecutor: reduce_pool,
    memoryview: reduce_memoryview,
}
if _c_scanner is not None:
    REDUCERS[_c_scanner] = reduce_scanner

BY_NAME: dict[tuple[str, str], Callable[[Any], Any]] = {("PIL.ImageDraw", "ImageDraw"): reduce_draw}
