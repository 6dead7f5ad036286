"""IPython's own settings: what `%config`, `%precision`, `%xmode`, `%alias`, `%load_ext` and `%autoreload` change, and
magics defined in the notebook."""

from __future__ import annotations

import weakref
from typing import Any

from .settings import Item

_PLAIN = (bool, int, float, str, type(None))
_FORMATTER = (
    "float_format",
    "float_precision",
    "max_width",
    "max_seq_length",
    "pprint",
    "newline",
    "verbose",
    "enabled",
)


def items(shell: Any) -> list[Item]:
    """IPython's settings of this shell, as pseudo-variables."""
    return [
        Item("%config", "", lambda: _traits(shell), lambda value: _put_traits(shell, value)),
        Item("%xmode", "", lambda: shell.InteractiveTB.mode, lambda mode: shell.InteractiveTB.set_mode(mode)),
        Item("%alias", "", lambda: _aliases(shell), lambda value: _put_aliases(shell, value)),
        Item("%load_ext", "", lambda: sorted(shell.extension_manager.loaded), lambda value: _load(shell, value)),
        Item("%autoreload", "", lambda: _autoreload(shell), lambda value: _put_autoreload(shell, value)),
    ]


def _configurables(shell: Any) -> dict[str, Any]:
    # IPython makes its magics' objects when it needs them: their being there says nothing.
    found = {type(each).__name__: each for each in shell.configurables if not type(each).__name__.endswith("Magics")}
    for kind, formatter in shell.display_formatter.formatters.items():
        found[f"formatter {kind}"] = formatter
    backend = _inline_backend(shell)
    if backend is not None:
        found["InlineBackend"] = backend
    found.pop("HistoryManager", None)
    found.pop("ProfileDir", None)
    return found


def _inline_backend(shell: Any) -> Any:
    import sys

    module = sys.modules.get("matplotlib_inline.config")
    return None if module is None else module.InlineBackend.instance(parent=shell)


def _traits(shell: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for name, each in _configurables(shell).items():
        values = {trait: getattr(each, trait) for trait in _names(each)}
        found[name] = {trait: value for trait, value in values.items() if _plain(value)}
    return found


def _names(each: Any) -> tuple[str, ...]:
    """Of its settings. traitlets finds them anew each time, which costs more than to read them all."""
    found = _named.get(type(each))
    if found is None:
        found = _named[type(each)] = tuple(name for name in each.trait_names(config=True) if name not in _OWN)
    return found


_named: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()

_OWN = frozenset({"ipython_dir", "history_length", "logfile", "logappend", "logstart", "parent", "log"})
"""Traits that belong to the process."""


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_plain(key) and _plain(item) for key, item in value.items())
    return isinstance(value, _PLAIN)


def _put_traits(shell: Any, value: dict[str, dict[str, Any]]) -> None:
    if "InlineBackend" in value:
        import matplotlib_inline.config  # noqa: F401 - so that it is among the configurables
    there = _configurables(shell)
    for name, traits in value.items():
        for trait, wanted in traits.items():
            each = there.get(name)
            if each is not None and each.has_trait(trait) and getattr(each, trait) != wanted:
                setattr(each, trait, wanted)


def _aliases(shell: Any) -> list[tuple[str, str]]:
    return [(name, command) for name, command in shell.alias_manager.aliases if isinstance(command, str)]


def _put_aliases(shell: Any, value: list[tuple[str, str]]) -> None:
    manager = shell.alias_manager
    for name, _ in set(manager.aliases) - set(value):
        manager.undefine_alias(name)
    for name, command in value:
        manager.soft_define_alias(name, command)


def _load(shell: Any, value: list[str]) -> None:
    for name in value:
        if name not in shell.extension_manager.loaded:
            shell.extension_manager.load_extension(name)


def _reloader(shell: Any) -> Any:
    magics = shell.magics_manager.registry.get("AutoreloadMagics")
    return None if magics is None else magics._reloader


def _autoreload(shell: Any) -> dict[str, Any] | None:
    reloader = _reloader(shell)
    if reloader is None:
        return None
    return {
        "enabled": reloader.enabled,
        "check_all": reloader.check_all,
        "modules": sorted(reloader.modules),
        "skip_modules": sorted(reloader.skip_modules),
    }


def _put_autoreload(shell: Any, value: dict[str, Any]) -> None:
    _load(shell, ["autoreload"])
    reloader = _reloader(shell)
    reloader.enabled, reloader.check_all = value["enabled"], value["check_all"]
    reloader.modules, reloader.skip_modules = (
        dict.fromkeys(value["modules"], True),
        dict.fromkeys(value["skip_modules"], True),
    )


def notebook_magics(shell: Any) -> dict[str, dict[str, Any]]:
    """Functions of the notebook that it registered as magics, by kind and name."""
    found: dict[str, dict[str, Any]] = {}
    for kind, registered in shell.magics_manager.magics.items():
        for name, function in registered.items():
            if getattr(function, "__globals__", None) is shell.user_ns:
                found.setdefault(kind, {})[name] = function
    return found


def put_magics(shell: Any, value: dict[str, dict[str, Any]]) -> None:
    for kind, registered in notebook_magics(shell).items():
        for name in registered:
            del shell.magics_manager.magics[kind][name]
    for kind, registered in value.items():
        shell.magics_manager.magics[kind].update(registered)
