"""What a cell changes outside the namespace: working directory, environment, sys.path, installed packages.

`Watcher.changes()` compares with what it saw last; `apply()` brings a standby to the same place and returns what
it could not do. Variables that belong to one replica (its grant, its own NBOS_ settings) are never carried over.
What the log cannot hold (text that is not UTF-8, very long values) is left out, and named in `Watcher.left`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from .capture import names

_OWN = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_", "NBOS_", "JPY_", "HOSTNAME")

WireEffects = dict[str, Any]

ENVIRON_BYTES = 64 * 1024
PATH_BYTES = 32 * 1024
"""What one cell's changes of the environment, or of sys.path, may come to."""


class Watcher:
    """What this process's surroundings were when the log last agreed with them."""

    def __init__(self) -> None:
        self._cwd = _cwd()
        self._environ = _environ()
        self._sys_path = list(sys.path)
        self._sites = _site_marks()
        self._packages: dict[str, str] | None = None
        self.left: dict[str, str] = {}
        """What the last `changes()` could not put into an entry, by a name for it, with the reason."""

    def prepare(self) -> None:
        """Called before the first cell: the versions to compare with, when a cell installs something. Costs some
        10 ms."""
        if self._packages is None:
            self._packages = _versions()

    def changes(self) -> WireEffects:
        """What is different now, in the form of an entry's `effects`; remembers it."""
        found: WireEffects = {}
        self.left = {}
        cwd, environ = _cwd(), _environ()
        if cwd != self._cwd:
            self._cwd = cwd
            if names.writable(cwd):
                found["cwd"] = cwd
            else:
                self.left[CWD] = f"the path {names.label(cwd)} cannot be replicated"
        if environ != self._environ:
            found["environ"] = self._writable(difference(self._environ, environ))
            self._environ = environ
        if sys.path != self._sys_path:
            self._sys_path = list(sys.path)
            found["sys_path"] = self._paths()
        sites = _site_marks()
        if sites != self._sites:
            self._sites = sites
            importlib.invalidate_caches()
            versions = _versions()
            new = {k: v for k, v in versions.items() if (self._packages or {}).get(k) != v}
            if self._packages is not None and new:
                found["packages"] = new
            self._packages = versions
        return found

    def _writable(self, changed: dict[str, str | None]) -> dict[str, str | None]:
        room = ENVIRON_BYTES
        kept: dict[str, str | None] = {}
        for name, value in changed.items():
            size = len(name) + len((value or "").encode("utf-8", "surrogatepass"))
            if not names.writable(name):
                self.left[variable(name)] = names.why_not_writable(name)
            elif value is not None and not names.encodable(value):
                self.left[variable(name)] = "its value cannot be encoded as UTF-8"
            elif size > room:
                self.left[variable(name)] = f"a value of {size} bytes, more than one cell's changes can hold"
            else:
                kept[name] = value
                room -= size
        return kept

    def _paths(self) -> list[str]:
        room = PATH_BYTES
        kept: list[str] = []
        left: list[str] = []
        for path in map(str, self._sys_path):
            size = len(path.encode("utf-8", "surrogatepass"))
            fits = names.writable(path) and size <= room
            (kept if fits else left).append(path)
            room -= size if fits else 0
        if left:
            self.left[SYS_PATH] = f"{len(left)} paths cannot be replicated, the first: {names.label(left[0])[:200]}"
        return kept

    def apply(self, effects: Mapping[str, Any]) -> dict[str, str]:
        """Do the same here. Returns what could not be done, by a name for it, with the reason."""
        failed: dict[str, str] = {}
        if effects.get("cwd"):
            try:
                os.chdir(effects["cwd"])
            except OSError as err:
                failed[CWD] = f"working directory {effects['cwd']}: {err.strerror or err}"
        for name, value in (effects.get("environ") or {}).items():
            if value is None:
                os.environ.pop(name, None)
            elif not name.startswith(_OWN):
                os.environ[name] = value
        if effects.get("sys_path") is not None:
            sys.path[:] = effects["sys_path"]
            importlib.invalidate_caches()
        self._cwd, self._environ, self._sys_path = _cwd(), _environ(), list(sys.path)
        self._sites = _site_marks()
        return failed


CWD = "%cd"
SYS_PATH = "sys.path"


def variable(name: str) -> str:
    """An environment variable's name among the lost."""
    return f"%env {names.label(name)}"


def names_of(effects: Mapping[str, Any]) -> list[str]:
    """Under which names the lost would have these changes."""
    found = [variable(name) for name in effects.get("environ") or ()]
    found += [CWD] if "cwd" in effects else []
    return found + ([SYS_PATH] if "sys_path" in effects else [])


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # the directory was removed under us


def _environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}


def here() -> tuple[str, dict[str, str], list[str]]:
    """Working directory, environment and sys.path as they are now."""
    return _cwd(), _environ(), list(sys.path)


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    """What makes `before` an environment like `after`; None: not set."""
    changed: dict[str, str | None] = {name: value for name, value in after.items() if before.get(name) != value}
    changed.update({name: None for name in before if name not in after})
    return changed


def _site_marks() -> tuple[tuple[str, int], ...]:
    """Modification times of the directories packages are installed into."""
    marks = []
    for path in sys.path:
        if path.endswith(("site-packages", "dist-packages")):
            try:
                marks.append((path, os.stat(path).st_mtime_ns))
            except OSError:
                continue  # named in sys.path, not there
    return tuple(marks)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name not in found:
            found[name] = distribution.version
    return found


def install(packages: Mapping[str, str]) -> dict[str, str]:
    """Install what is not there yet, exactly in these versions, without their dependencies (which stand in the
    same list)."""
    importlib.invalidate_caches()
    here = _versions() if packages else {}
    missing = [f"{name}=={version}" for name, version in packages.items() if here.get(name) != version]
    if not missing:
        return {}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input", *missing]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    importlib.invalidate_caches()
    if done.returncode == 0:
        return {}
    why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return {"%pip": f"{' '.join(missing)}: {why}"[:300]}
