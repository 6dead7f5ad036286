"""Whether a cell that does not say what it needs has to ask for a GPU before it starts, or may begin without one.

Before it starts: it can reach variables with data of a device, by the rules of `capture/touch.py` as lazy loading uses
them; it may start programs, which see the devices that stand in the environment then; a library that calls CUDA by
itself is loaded; the same text has used a GPU before. A superset: in doubt it asks, as a kernel without this does.
`gpu.gate` stops what this does not foresee. Pure.
"""

from __future__ import annotations

import hashlib
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ..capture.unloaded import needed, words_of
from .gate import LIBRARIES

PROGRAMS = frozenset({"subprocess", "multiprocessing", "Popen", "posix_spawn", "pexpect"})
"""Words of code that starts programs."""
_OS = re.compile(r"\bos\s*\.\s*(?:system|popen|exec|spawn)")
_COMMAND = re.compile(r"^\s*(?:[\w, ]+=\s*)?(?:!{1,2}|%{1,2}(?:sx|system|bash|sh|script)\b)[ \t]*(.*)$", re.MULTILINE)
_SCRIPT = re.compile(r"^\s*%%(?:bash|sh|script|sx|system)\b|^\s*!!", re.MULTILINE)

_TOOLS = """
apt apt-get cat cd conda cp curl cut date df du echo env file find free git grep gunzip gzip head hostname id jq kill
less ln ls mamba mkdir mv nproc pip pip3 ps pwd rm rmdir rsync sed sleep sort tail tar tee touch tree uname uniq unzip
uv wc wget which whoami xz zip
"""
HARMLESS = frozenset(_TOOLS.split())
"""Programs that use no GPU."""

KEPT = 1000


class Touched:
    """Texts of cells that used a GPU though they did not ask for one: they will again."""

    def __init__(self) -> None:
        self._texts: OrderedDict[bytes, None] = OrderedDict()

    def add(self, code: str) -> None:
        self._texts[_digest(code)] = None
        if len(self._texts) > KEPT:
            self._texts.popitem(last=False)

    def __contains__(self, code: object) -> bool:
        return isinstance(code, str) and _digest(code) in self._texts


def asks_first(
    code: str,
    expressions: Iterable[str],
    namespace: Mapping[str, Any],
    on_device: Collection[str],
    mentions: Callable[[str], Iterable[str] | None],
    more: Iterable[str],
    modules: Collection[str],
) -> str:
    """Why this cell asks before it starts; '' where it may begin without a GPU.

    on_device: variables with data of a device. mentions: as `needed` takes it. more: words of functions that are
    reached from elsewhere. modules: what is imported.
    """
    library = next((name for name in LIBRARIES if name in modules), "")
    if library:
        return f"{library} is loaded, which uses CUDA by itself"
    if _OS.search(code) or _starts_program(code):
        return "it starts a program, which may use a GPU"
    words = words_of(code).union(*map(words_of, expressions))
    if on_device:
        reached = needed(words.union(more), on_device, namespace, mentions)
        if reached:
            return f"it can reach {min(reached)}, which holds data of a GPU"
    starters = PROGRAMS | {name for name, value in namespace.items() if _is_starter(value)}
    if not starters.isdisjoint(_followed(words, namespace, mentions)):
        return "it may start a program, which may use a GPU"
    return ""


def _followed(
    words: Iterable[str], namespace: Mapping[str, Any], mentions: Callable[[str], Iterable[str] | None]
) -> set[str]:
    """The words, and those of the functions that they name, as far as these are known."""
    waiting, found = list(words), set[str]()
    while waiting:
        word = waiting.pop()
        if word not in found:
            found.add(word)
            waiting += (mentions(word) or ()) if word in namespace else ()
    return found


def _starts_program(code: str) -> bool:
    return bool(_SCRIPT.search(code)) or not all(map(_harmless, _COMMAND.findall(code)))


def _harmless(line: str) -> bool:
    """Whether each command of the line is one of those that use no GPU."""
    return not re.search(r"[`$(]", line) and all(
        _program(part) in HARMLESS for part in re.split(r"[;|&]+", line) if part.strip()
    )


def _program(command: str) -> str:
    """The first word that is no assignment, without its folder."""
    words = [word for word in command.split() if "=" not in word and word != "sudo"]
    return words[0].rpartition("/")[2] if words else ""


def _is_starter(value: Any) -> bool:
    if not issubclass(type(value), types.ModuleType):
        return False
    parts = str(getattr(value, "__name__", "")).split(".")
    return not PROGRAMS.isdisjoint(parts)


def _digest(code: str) -> bytes:
    return hashlib.blake2b(code.encode("utf-8", "surrogatepass"), digest_size=16).digest()
