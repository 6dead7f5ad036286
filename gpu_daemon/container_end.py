"""What the end, or the failed start, of a replica's container means, in words for its user. No IO."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_daemon import container_check
from gpu_daemon.runtime import Exit

GIB = 1 << 30
KILLED = 128 + signal.SIGKILL
WORDS = 200
"""Characters of the last line that are told."""


def plain_end(code: int) -> Exit | None:
    """By the exit status alone; None where its last words must be read."""
    if code == 0:
        return Exit(0)
    return Exit(signal=code - 128) if 128 < code < 128 + signal.NSIG else None


def memory_end(found: Mapping[str, Any]) -> Exit | None:
    """When it ended for want of memory. found: the Engine's description of the container."""
    # The system's killer takes one process; the container ends for it only with the replica itself.
    if not found["State"].get("OOMKilled") or found["State"]["ExitCode"] not in (KILLED, 0, 1):
        return None
    limit = found["HostConfig"]["Memory"]
    most = f"all of its {limit / GIB:.2f} GiB" if limit else "more than the host has"
    return Exit(signal=signal.SIGKILL, detail=f"killed: it used {most} memory; use less, or ask for a larger limit")


def told_end(code: int, lines: Sequence[str], image: str) -> Exit:
    """By what was written before it."""
    told = [line.removeprefix(container_check.MARK) for line in lines if line.startswith(container_check.MARK)]
    if code == container_check.UNFIT and told:
        return Exit(code, detail=f"the image {image} cannot run a kernel: {told[-1]}")
    if code in (126, 127) and any("tini" in line and "exec" in line for line in lines):
        return Exit(code, detail=no_python(image))
    return Exit(code, detail=f"ended with exit status {code}: {lines[-1].strip()[:WORDS]}" if lines else "")


def failed_start(text: str, image: str) -> str:
    """Why the Engine, which says `text`, did not start a container."""
    if "executable file not found" in text or ("no such file or directory" in text and "exec" in text):
        return no_python(image)
    if "could not select device driver" in text or "unresolvable CDI devices" in text:
        return (
            f"Docker cannot give this host's GPUs to containers: {text}; install and configure nvidia-container-toolkit"
        )
    if "bind source path does not exist" in text:
        return f"{text}; the folder must be on this host (the option Docker.volumes names it)"
    return f"Docker could not start the container: {text}"


def no_python(image: str) -> str:
    return (
        f"the image {image} cannot run a kernel: it has no Python on its PATH (python3, or what the option "
        "Docker.python names); use a base with Python 3.11 or later and pip install 'nbos[kernel]'"
    )
