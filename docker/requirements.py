"""Prints what the extras of nbos that are named as arguments need, one requirement a line, without nbos itself.

The images install this first, so that a change of our own code does not make them fetch everything again.
"""

import re
import sys
import tomllib
from pathlib import Path

OWN = re.compile(r"nbos\[([\w,-]+)\]")


def requirements(table: dict[str, list[str]], extras: list[str]) -> set[str]:
    found: set[str] = set()
    for extra in extras:
        for requirement in table[extra]:
            own = OWN.fullmatch(requirement)
            found |= requirements(table, own[1].split(",")) if own else {requirement}
    return found


if __name__ == "__main__":
    project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    print("\n".join(sorted(requirements(project["optional-dependencies"], sys.argv[2:]))))
