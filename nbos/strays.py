"""Containers and networks of replicas whose daemon does not run any more: found by label, removed when asked to.

Guarantees: what a living daemon owns is left alone (it holds the lock in its run directory); homes and other volumes
are never touched.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLUSTER, RUN_DIR = "nbos.cluster", "nbos.run-dir"


@dataclass(frozen=True)
class Stray:
    """kind: container or network. id: as Docker has it. about: whose it was, for people."""

    kind: str
    id: str
    name: str
    about: str
    interface: str = ""


def find_strays(api: Any, lives: Callable[[str], bool]) -> list[Stray]:
    """api: docker's APIClient. lives: whether the daemon with this run directory runs."""
    found = [
        Stray("container", c["Id"], c["Names"][0].lstrip("/"), _about(c["Labels"], c["Status"]))
        for c in api.containers(all=True, filters={"label": CLUSTER})
        if is_stray(c["Labels"], lives)
    ]
    for network in api.networks(filters={"label": CLUSTER}):
        if is_stray(network["Labels"], lives):
            interface = network["Options"].get("com.docker.network.bridge.name", "")
            found.append(Stray("network", network["Id"], network["Name"], _about(network["Labels"]), interface))
    return found


def is_stray(labels: Mapping[str, str], lives: Callable[[str], bool]) -> bool:
    return not lives(labels.get(RUN_DIR, ""))


def _about(labels: Mapping[str, str], status: str = "") -> str:
    whose = ""
    if kernel := labels.get("nbos.kernel"):
        whose = f"kernel {kernel} of {labels.get('nbos.owner')}, "
    elif "nbos.warm" in labels:
        whose = _about_warm(labels)
    return f"{whose}host {labels.get('nbos.host')} of cluster {labels.get(CLUSTER)}{', ' + status if status else ''}"


def _about_warm(labels: Mapping[str, str]) -> str:
    """Of one that was started ahead: its labels cannot tell what it has become."""
    owner = labels.get("nbos.owner")
    of = f" of {owner}" if owner else ""
    return f"a container of {labels.get('nbos.image')} that waits for a kernel{of}, or has become one, "


def daemon_lives(run_dir: str) -> bool:
    """Whether a daemon holds this run directory. One that this user may not look at counts as living."""
    try:
        with open(Path(run_dir) / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def remove_strays(api: Any, strays: Sequence[Stray]) -> None:
    """Containers first: a network with containers stays. Raises what Docker says."""
    from gpu_daemon.walls import remove_walls

    for stray in strays:
        if stray.kind == "container":
            api.remove_container(stray.id, v=True, force=True)
    for stray in strays:
        if stray.kind == "network":
            api.remove_network(stray.id)
            remove_walls(stray.interface)
