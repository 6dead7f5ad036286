"""State of a notebook that stands in no variable: random states, settings of libraries and of IPython, open figures.

It travels as pseudo-variables, whose names begin with `%` and reach no namespace. *Settings* are plain values: read
after every cell, compared by value, and put back by a function of their own. *Linked* ones refer to the notebook's
objects (open figures, magics and reducers made in the notebook) and are captured together with the variables they
share them with. A library is looked at only when the user's program has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import interactive, rebuilt, settings


def is_pseudo(name: str) -> bool:
    """Whether `name` stands for hidden state rather than a variable."""
    return name.startswith("%")


class Hidden:
    """`shell`: the IPython shell."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._items: dict[str, settings.Item] = {item.name: item for item in settings.ITEMS}
        for item in interactive.items(shell):
            self._items[item.name] = item

    def values(self) -> dict[str, Any]:
        """The settings as they are now. One that cannot be read is left out."""
        found = {}
        for item in self._items.values():
            if not item.module or item.module in sys.modules:
                value = _try(item.get)
                if value is not None:
                    found[item.name] = value
        return found

    def is_setting(self, name: str) -> bool:
        """Whether it is a plain value, and not linked to the notebook's objects."""
        return name in self._items

    def linked(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of the pseudo-variables that refer to the notebook's objects; those that are empty are left
        out."""
        for name, get in self._links().items():
            value = _try(get)
            if value:
                yield name, value

    def apply(self, values: Mapping[str, Any], gone: set[str]) -> dict[str, str]:
        """Bring this process to the same state. Returns what could not be done, with the reason."""
        failed = {}
        for name, value in values.items():
            item = self._items.get(name)
            put = item.put if item is not None else self._puts().get(name)
            if put is None:
                continue  # written by another version
            try:
                put(value)
            except Exception as err:  # noqa: BLE001 - a library of another version here must not stop the entry
                failed[name] = f"cannot be set on this replica: {type(err).__name__}: {err}"[:300]
        for name in gone & self._puts().keys():
            failed.update(self._empty(name))
        return failed

    def _empty(self, name: str) -> dict[str, str]:
        try:
            self._puts()[name](None)
        except Exception as err:  # noqa: BLE001 - as above
            return {name: f"cannot be emptied on this replica: {type(err).__name__}: {err}"[:300]}
        return {}

    def _links(self) -> dict[str, Callable[[], Any]]:
        return {
            "%figures": settings.open_figures,
            "%magics": lambda: interactive.notebook_magics(self._shell),
            "%reducers": lambda: rebuilt.registered,
        }

    def _puts(self) -> dict[str, Callable[[Any], None]]:
        return {
            "%figures": settings.put_figures,
            "%magics": lambda value: interactive.put_magics(self._shell, value or {}),
            "%reducers": lambda value: rebuilt.put_registered(value or {}),
        }


def _try(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception:  # noqa: BLE001 - a library half imported, or of a version that differs: its state is left out
        return None
