"""Which Pythons the replicas of one kernel may have: functions travel as bytecode of one minor version."""

from __future__ import annotations

from nbos_cluster.kernelview import KernelView


def other_python(view: KernelView, index: int, python: str) -> str:
    """Why a replica with this Python cannot be one of the kernel's, or ''."""
    incarnation = view.epoch.incarnation if view.epoch is not None else 1
    for other in view.replicas.values():
        there = (other.index, other.state, other.incarnation)
        if there[0] == index or there[1:] != ("ready", incarnation) or not _differ(python, other.python):
            continue
        return (
            f"replica {index} has Python {python}, replica {other.index} on host {other.host} has Python "
            f"{other.python}: functions do not travel between minor versions; use the same image (or the same Python) "
            "on every host"
        )
    return ""


def _differ(one: str, other: str) -> bool:
    """Whether both are versions, of different minor numbers."""
    a, b = (version.split(".")[:2] for version in (one, other))
    return len(a) == len(b) == 2 and a != b
