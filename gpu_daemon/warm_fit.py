"""Whether a replica that is started now would be what a fresh process is, if it were forked from the warm parent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from importlib.machinery import all_suffixes
from pathlib import Path

from gpu_daemon.warm_learning import environment
from gpu_daemon.warm_process import Ready, environment_reads


async def why_afresh(ready: Ready, base: Mapping[str, str], env: Mapping[str, str], cwd: str, then: str) -> str:
    """Why it must be started afresh, '' where it need not. base: the parent's environment; then: what was installed
    when it imported."""
    if reads := environment_reads(ready, base, env):
        return f"replicas with their own {', '.join(reads)} start afresh: warm ones have read that already"
    if not ready.tops:
        return ""
    if environment() != then:
        return "packages have changed since the warm parent imported them: replicas start afresh until there is another"
    if shadow := await asyncio.to_thread(shadowing, cwd, ready.tops):
        return f"replicas in {cwd} start afresh: its {shadow} goes before the module of that name imported ahead"
    return ""


def shadowing(cwd: str, tops: frozenset[str]) -> str:
    """What lies in the folder that a replica's imports look into first, and has the name of one of these modules."""
    try:
        with os.scandir(cwd) as entries:
            names = sorted(entry.name for entry in entries if entry.name.partition(".")[0] in tops)
    except OSError:
        return ""
    for name in names:
        top, dot, _ = name.partition(".")
        module = dot and name.removeprefix(top) in all_suffixes()
        if module or (not dot and (Path(cwd) / name / "__init__.py").exists()):
            return name
    return ""
