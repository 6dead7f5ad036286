"""Trying out modules before they are imported ahead: each batch in a process that ends afterwards
(`nbos_kernel.warm.judging` says what is asked of them). A module that ends its trial's process, or never comes to an
end, has not passed; the others are tried in the next."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_daemon.warm_process import LONGEST, launch, reap

WITHIN = 300.0
"""Seconds for one module: it gets only the time that nobody else on this host wants."""


@dataclass(frozen=True)
class Verdict:
    """reason: why it is not imported ahead, '' where it passed. seconds of processor time, bytes of memory."""

    module: str
    reason: str
    seconds: float = 0.0
    size: int = 0


async def tried(modules: Sequence[str], env: Mapping[str, str], folder: Path) -> AsyncIterator[Verdict]:
    """The verdicts up to the first that did not pass. Raises NotWarm when no process can be started."""
    process, own = await asyncio.to_thread(launch, ["--judge"], modules, env, folder)
    own.setblocking(False)
    left = list(modules)
    try:
        while left:
            verdict = await _told(own, left[0], folder)
            left.pop(0)
            yield verdict
            if verdict.reason:
                return
    finally:
        own.close()
        process.kill()
        await reap(process)


async def _told(own: socket.socket, module: str, folder: Path) -> Verdict:
    try:
        async with asyncio.timeout(WITHIN):
            data = await asyncio.get_running_loop().sock_recv(own, LONGEST)
    except TimeoutError:
        return Verdict(module, f"its import took more than {WITHIN:g} s")
    except ConnectionError:
        data = b""
    if not data:
        return Verdict(module, f"its import ended the process; see {folder / 'log'}")
    told = json.loads(data)
    return Verdict(module, str(told["reason"]), float(told["seconds"]), int(told["size"]))
