"""What callers are shown: KernelModel and the status, as plain JSON (docs/protocol.md, section 3). No IO.

Who sees what is decided here: a kernel's secrets go to its owner only; others' kernels, grants and places in
queues to Hub admins only.
"""

from __future__ import annotations

from typing import Any

import msgspec

from nbos_cluster import moving
from nbos_cluster.kernelview import KernelView
from nbos_cluster.records import KernelSpec, Move
from nbos_cluster.statelog import fold_unread

from .auth import Caller
from .copy import ClusterCopy
from .hostmodels import host_model


def may_see(caller: Caller, spec: KernelSpec) -> bool:
    return caller.admin or (caller.kind == "user" and caller.name == spec.owner)


def kernel_model(view: KernelView, *, secrets: bool) -> dict[str, Any]:
    """KernelModel of a kernel that has a spec."""
    spec = view.spec
    if spec is None:
        raise LookupError(f"kernel {view.kernel} has no spec")
    model: dict[str, Any] = {
        "kernel_id": spec.kernel,
        "owner": spec.owner,
        "server": spec.server,
        "replicas": spec.replicas,
        "epoch": view.epoch.epoch if view.epoch else 0,
        "revision": view.members_rev,
        "incarnation": spec.incarnation,
        "created": spec.created,
        "resources": resources_model(spec.resources),
        "durable": spec.durable,
        "lazy": spec.lazy,
        "rerun": spec.rerun,
        "members": [member_model(view, spec, index) for index in sorted(spec.placement, key=int)],
        "last": view.last,
        "executor": view.executor,
        "lost": lost_names(view),
        "notebook": spec.env.get("JPY_SESSION_NAME", ""),
        "move": move_model(spec.move, moving.progress(view)) if spec.move is not None else None,
        "moved": move_model(spec.moved, "") if spec.moved is not None else None,
    }
    if secrets:
        model["connection"] = {
            "key": spec.key,
            "signature_scheme": "hmac-sha256",
            "curve_publickey": spec.curve_publickey,
            "curve_secretkey": spec.curve_secretkey,
        }
    return model


def member_model(view: KernelView, spec: KernelSpec, index: str) -> dict[str, Any]:
    """One replica. `state` is 'missing' while no daemon says anything about it."""
    record = view.replicas.get(int(index))
    executing = view.executor == int(index)
    model: dict[str, Any] = {
        "index": int(index),
        "host": spec.placement[index],
        "state": "missing",
        "ip": "",
        "ports": None,
        "applied": -1,
        "pid": 0,
        "role": "executor" if executing else "standby",
        "reason": "",
    }
    if record is not None and record.host == spec.placement[index]:
        model |= {
            "state": record.state if record.incarnation == spec.incarnation else "starting",
            "ip": record.ip,
            "ports": msgspec.to_builtins(record.ports),
            "applied": record.applied,
            "pid": record.pid,
            "reason": record.reason,
        }
    return model


def move_model(move: Move, progress: str) -> dict[str, Any]:
    """A move under way, or how the latest one ended (phase done or undone)."""
    return {**msgspec.structs.asdict(move), "progress": progress}


def lost_names(view: KernelView) -> dict[str, str]:
    """The variables that are not replicated, with the reasons: what the log says now, and what replicas could
    not load."""
    first = view.checkpoint.upto + 1 if view.checkpoint else 0
    entries = [view.log[n] for n in sorted(view.log) if n >= first]
    lost = dict(fold_unread(view.checkpoint, entries).lost) if entries or view.checkpoint else {}
    for record in view.replicas.values():
        for name, reason in record.lost.items():
            lost.setdefault(name, f"{reason} (replica {record.index})")
    return lost


def is_ready(view: KernelView) -> bool:
    """Whether a replica of the present incarnation is ready where it should be."""
    spec = view.spec
    return spec is not None and any(
        record.state == "ready"
        and record.incarnation == spec.incarnation
        and record.host == spec.placement.get(str(index))
        for index, record in view.replicas.items()
    )


def resources_model(resources: Any) -> dict[str, Any]:
    return {
        "gpus": resources.gpus,
        "tpcs": resources.tpcs,
        "memory": resources.memory,
        "model": resources.model,
    }


def status_model(copy: ClusterCopy, caller: Caller) -> dict[str, Any]:
    """Everything that the caller may see of the cluster."""
    views = [v for v in copy.living() if v.spec is not None and may_see(caller, v.spec)]
    counts = copy.replicas_on()
    return {
        "hosts": [host_model(host, copy, caller, counts) for _, host in sorted(copy.hosts.items())],
        "away": sorted(copy.absent),
        "queues": [msgspec.to_builtins(t) | {"ticket": t.ticket} for t in copy.tickets_of(v.kernel for v in views)],
        "waiting": len(copy.tickets),
        "kernels": [kernel_model(v, secrets=False) for v in sorted(views, key=lambda v: v.kernel)],
        "unreadable": dict(copy.unreadable) if caller.admin else {},
    }
