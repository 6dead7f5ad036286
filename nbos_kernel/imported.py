"""Which installed modules this kernel's cells import, for the host's choice of what to import ahead (docs/warm.md).

Costs a cell nothing but a comparison of two numbers while it loads no module; what is found travels with the next
message to the daemon that goes anyway. Only names travel, of packages that lie in Python's own folders of packages.
"""

from __future__ import annotations

import re
import site
import sys
from collections.abc import Iterator

LONGEST = 64 * 1024
"""Characters of a cell that are looked at."""
MOST = 100
_STATEMENT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+\(?(.*)|import[ \t]+(.+))$", re.MULTILINE)
_NAME = re.compile(r"[\w.]+")


class Imports:
    def __init__(self) -> None:
        self._count = len(sys.modules)
        self._known: set[str] = set()
        self._news: list[str] = []
        self._folders = tuple(f"{folder}/" for folder in site.getsitepackages())

    def ran(self, source: str) -> None:
        """This cell was run here, or applied."""
        count = len(sys.modules)
        if count == self._count:
            return
        self._count = count
        for name in named(source[:LONGEST]):
            if name not in self._known and len(self._known) < 10 * MOST and name in sys.modules:
                self._known.add(name)
                if self._installed(name):
                    self._news.append(name)

    def news(self) -> list[str]:
        """What nobody was told yet."""
        news, self._news = self._news[:MOST], self._news[MOST:]
        return news

    def _installed(self, name: str) -> bool:
        module = sys.modules.get(name.partition(".")[0])
        file = getattr(module, "__file__", None)
        return isinstance(file, str) and file.startswith(self._folders)


def named(source: str) -> Iterator[str]:
    """What its import statements name; of `from a import b` both `a` and `a.b`, which may be a module."""
    for package, names, modules in _STATEMENT.findall(source):
        if package:
            yield package
        for part in (names or modules).split("#")[0].split(","):
            name = _NAME.match(part.strip())
            if name is not None:
                yield f"{package}.{name[0]}" if package else name[0]
