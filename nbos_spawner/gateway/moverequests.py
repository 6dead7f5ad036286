"""An administrator has one replica moved, or a move taken back. What is asked is checked here; `moves` carries it
out."""

from __future__ import annotations

import time

import msgspec

from nbos_cluster import moving
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import Txn
from nbos_cluster.placement import HostLoad, NoRoom, busiest, choose_target
from nbos_cluster.records import KernelSpec

from .auth import Caller
from .errors import ApiError


class MoveWanted(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST api/kernels/<id>/move: names of hosts; empty: the one that is most (least) loaded."""

    source: str = msgspec.field(default="", name="from")
    to: str = ""


def read_move_wanted(body: bytes) -> MoveWanted:
    """Raises ApiError 400."""
    try:
        return msgspec.json.decode(body or b"{}", type=MoveWanted)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise ApiError(400, "malformed", f"the body is not a request to move: {err}") from err


def check_admin(caller: Caller) -> None:
    if not caller.admin:
        raise ApiError(403, "not_admin", "only an administrator's token (scope admin:users) moves replicas")


def begin(view: KernelView, wanted: MoveWanted, hosts: dict[str, HostLoad]) -> Txn:
    """Raises ApiError 409 when it cannot be, 400 for a host that does not exist."""
    spec = view.spec
    assert spec is not None
    if spec.move is not None:
        raise ApiError(409, "moving", f"{moving.progress(view)}; one replica of a kernel moves at a time")
    source = _source(spec, wanted, hosts)
    try:
        host = wanted.to or choose_target(spec, hosts, source)
    except NoRoom as err:
        raise ApiError(409, "no_room", str(err)) from err
    _check_target(spec, host, hosts)
    return moving.begin(view, int(source), host, "asked", time.time())


def _source(spec: KernelSpec, wanted: MoveWanted, hosts: dict[str, HostLoad]) -> str:
    if not wanted.source:
        return busiest(spec, {name: load for name, load in hosts.items() if name != wanted.to})
    here = [index for index, host in spec.placement.items() if host == wanted.source]
    if not here:
        there = ", ".join(sorted(set(spec.placement.values())))
        raise ApiError(409, "not_there", f"no replica of it is on host {wanted.source!r}; they are on {there}")
    return here[0]


def _check_target(spec: KernelSpec, host: str, hosts: dict[str, HostLoad]) -> None:
    load = hosts.get(host)
    if load is None:
        raise ApiError(400, "no_such_host", f"no host {host!r} is there; there are {', '.join(sorted(hosts))}")
    if host in spec.placement.values():
        raise ApiError(409, "there_already", f"host {host} has a replica of this kernel already; choose another")
    if load.record.draining:
        raise ApiError(409, "draining", f"host {host} drains; choose another, or take that back with nbos drain --undo")
    if load.full:
        most = load.record.max_replicas
        raise ApiError(409, "no_room", f"host {host} holds {load.replicas} of at most {most} replicas; choose another")


def take_back(view: KernelView) -> Txn:
    """Raises ApiError 409 when there is nothing to take back, or it cannot be."""
    move = view.spec.move if view.spec is not None else None
    if move is None:
        raise ApiError(409, "not_moving", "no replica of this kernel is on its way")
    if move.why == "drain":
        raise ApiError(409, "draining", f"host {move.from_host} drains; use nbos drain {move.from_host} --undo")
    if moving.ready(view, move.source) is None:
        raise ApiError(409, "not_ready", f"replica {move.source} on host {move.from_host} is not ready; wait for it")
    return moving.turn(view, moving.Turn("returning", "taken back"))
