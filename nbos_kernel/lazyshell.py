"""Where IPython looks at the namespace by other ways than Python's own lookup: it sees what is not loaded, too.

Guarantees: completion, `%who` and `%who_ls` name variables that are not loaded and load nothing for it, unless what
they look into is small; a new result moves `_` on as it does elsewhere; `__main__.x`, which is how pickles find the
notebook's classes, loads x.
"""

from __future__ import annotations

import re
import types
from typing import Any

from .lazy import Lazy, NotLoadedError
from .progress import size

_TOKEN = re.compile(r"(?<![\w.%\"'/])([^\W\d]\w*)?$")
_IMPORT = re.compile(r"^\s*(from|import)\b")


def install(shell: Any, lazy: Lazy) -> None:
    """Make `shell` see what `lazy` holds. Once, before anything is left unloaded."""
    _list_names(shell, lazy)
    _move_results(shell, lazy)
    _attributes(shell, lazy)


def _list_names(shell: Any, lazy: Lazy) -> None:
    namespace = shell.magics_manager.registry["NamespaceMagics"]
    there = namespace.who_ls

    def who_ls(parameter_s: str = "") -> list[str]:
        if parameter_s.strip():
            lazy.load_all()  # it asks for types
        found: list[str] = there(parameter_s)
        return sorted({*found, *(name for name in lazy.table if not name.startswith("_"))})

    who_ls.__doc__ = there.__doc__
    namespace.who_ls = who_ls
    shell.magics_manager.magics["line"]["who_ls"] = who_ls


def _move_results(shell: Any, lazy: Lazy) -> None:
    hook = shell.displayhook
    there = hook.update_user_ns

    def update_user_ns(result: Any) -> None:
        try:
            lazy.load(("_", "__"))
        except NotLoadedError as err:
            lazy.tell(f"NBOS: the results before this one are not at hand as _ and __: {err}")
        there(result)

    hook.update_user_ns = update_user_ns


def _attributes(shell: Any, lazy: Lazy) -> None:
    class Main(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name in lazy.table:
                try:
                    return lazy.fetch(name)
                except KeyError:
                    pass  # it turned out to be lost: there is no such attribute
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    if type(shell.user_module) is types.ModuleType:
        Main.__name__, Main.__qualname__, Main.__module__ = "module", "module", "builtins"
        shell.user_module.__class__ = Main


def completed(reply: dict[str, Any], code: str, cursor: int, lazy: Lazy) -> dict[str, Any]:
    """IPython's answer to a completion request, with the names that are not loaded."""
    before = code[:cursor].rpartition("\n")[2]
    token = _TOKEN.search(before)
    if not lazy.table or token is None or _IMPORT.match(before):
        return reply
    text, matches = token[1] or "", reply["matches"]
    if matches and reply["cursor_start"] != cursor - len(text):
        return reply  # it completes something else than a name
    more = sorted(name for name in lazy.table if name.startswith(text) and name not in matches)
    more = [name for name in more if text.startswith("_") or not name.startswith("_")]
    start = cursor - len(text)
    reply.update(matches=[*matches, *more], cursor_start=start, cursor_end=cursor)
    types_there = reply["metadata"].get("_jupyter_types_experimental")
    if types_there is not None:
        types_there += [{"start": start, "end": cursor, "text": name, "type": "instance"} for name in more]
    return reply


def not_inspected(name: str, lazy: Lazy) -> dict[str, Any] | None:
    """What inspection says of a large variable that is not loaded; None when it is another name."""
    unloaded = lazy.table.get(name.partition(".")[0])
    if unloaded is None:
        return None
    text = (
        f"{name.partition('.')[0]}: {size(unloaded.size)}, not loaded on this replica since the kernel moved here; "
        "a cell that names it loads it"
    )
    return {"status": "ok", "found": True, "data": {"text/plain": text}, "metadata": {}}
