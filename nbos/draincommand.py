"""`nbos drain`: a host takes no new replicas, and those it has are moved away while cells run; `--undo` takes it back.
With `--gpu` only some of its GPUs are taken out of use, and `--undo` also ends what the daemon holds against them.

Guarantees: the host's record is changed only as it stood when it was read, under the lease of its daemon, so that it
ends with the daemon as before. The gateway moves the replicas a few at a time (`--wait`: until none is left, telling
how far it is).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nbos_cluster import keys, moving, records
from nbos_cluster.certs import CertError
from nbos_cluster.etcd import Etcd, EtcdError, EtcdUnavailable, TLSFiles
from nbos_cluster.kernelview import KernelView, KernelViews
from nbos_cluster.kv import Snapshot
from nbos_cluster.placement import HostLoad, NoRoom, choose_target, loads
from nbos_cluster.records import HostRecord

from .etcdcommand import admin_files
from .hostchange import DrainFailed, close_gpus, set_draining
from .state import StateDir


def run(options: argparse.Namespace) -> int:
    """The exit status."""
    try:
        asyncio.run(_run(options))
    except (CertError, EtcdError, EtcdUnavailable, DrainFailed, ValueError, OSError) as err:
        print(f"nbos drain: {err}", file=sys.stderr)
        return 1
    return 0


async def _run(options: argparse.Namespace) -> None:
    async with _etcd(options) as etcd:
        if options.gpu:
            for host in options.hosts:
                closed = await close_gpus(
                    etcd, keys.checked(host, "host name"), options.gpu, options.reason, options.undo
                )
                word = "may be used again" if options.undo else "takes no new cells"
                print("\n".join(f"GPU {gpu} of host {host} {word}" for gpu in closed))
            return
        for host in options.hosts:
            await set_draining(etcd, keys.checked(host, "host name"), not options.undo)
            print(
                f"host {host} takes {'replicas again' if options.undo else 'no new replicas; those it has are moved'}"
            )
        if options.wait and not options.undo:
            await _until_empty(etcd, options.hosts, options.wait)


def _etcd(options: argparse.Namespace) -> Etcd:
    """The one that the options name, else that of this machine's `nbos up`. Raises DrainFailed or CertError."""
    if options.endpoints:
        endpoints = [part.strip() for part in options.endpoints.split(",") if part.strip()]
        return Etcd(endpoints, admin_files(options.dir), timeout=10.0)
    state = StateDir.at(options.state_dir)
    info = state.info()
    if not info:
        raise DrainFailed(f"there is no NBOS in {state.path}; name it with --state-dir, or etcd with --endpoints")
    there = info["etcd"]
    tls = TLSFiles(Path(there["ca"]), Path(there["cert"]), Path(there["key"]))
    return Etcd(list(there["endpoints"]), tls, timeout=10.0)


async def _until_empty(etcd: Etcd, hosts: list[str], seconds: float) -> None:
    """Tells what moves, how far it is and what waits. Raises DrainFailed when replicas are still there after so
    long."""
    deadline, said = time.monotonic() + seconds, ""
    while True:
        found = await look(etcd)
        left = replicas_on(found, hosts)
        if not left:
            break
        text = "\n".join([f"{left} replica{'s' if left > 1 else ''} to be moved", *lines(found, hosts)])
        if text != said:
            print(text, flush=True)
            said = text
        if time.monotonic() > deadline:
            raise DrainFailed(
                f"{left} replicas are still on {', '.join(hosts)} after {seconds:g} s, for the reasons above (see also "
                "the gateway's log). The host goes on draining; take it back with --undo"
            )
        await asyncio.sleep(0.5)
    print("no replica is left there; the daemon may be stopped")


@dataclass(frozen=True)
class Found:
    """What the records say: living hosts, and every kernel."""

    hosts: list[HostRecord]
    kernels: list[KernelView]


async def look(etcd: Etcd) -> Found:
    kvs, revision = await etcd.range(keys.KERNELS)
    views = KernelViews()
    views.apply(Snapshot(kvs, revision))
    there, _ = await etcd.range(keys.HOSTS)
    hosts = [records.decode(kv.value, HostRecord) for kv in there if "/" not in kv.key.removeprefix(keys.HOSTS)]
    return Found(hosts, list(views.views.values()))


def replicas_on(found: Found, hosts: list[str]) -> int:
    """How many stand there, or are placed there."""
    return sum(len(_here(view, hosts)) for view in found.kernels)


def lines(found: Found, hosts: list[str]) -> list[str]:
    """One for each kernel that has a replica there: how far its move is, or why it has not begun."""
    specs = [view.spec for view in found.kernels if view.spec is not None]
    load = loads(found.hosts, specs)
    return [f"  kernel {v.kernel}: {_why_here(v, hosts, load)}" for v in found.kernels if _here(v, hosts)]


def _here(view: KernelView, hosts: list[str]) -> set[tuple[int, str]]:
    placed = {(int(i), host) for i, host in view.spec.placement.items()} if view.spec is not None else set()
    return {(i, h) for i, h in placed | {(i, r.host) for i, r in view.replicas.items()} if h in hosts}


def _why_here(view: KernelView, hosts: list[str], load: dict[str, HostLoad]) -> str:
    spec = view.spec
    placed = [i for i, host in spec.placement.items() if host in hosts] if spec is not None else []
    if spec is None or not placed:
        return "its process ends"
    if spec.move is not None:
        return moving.progress(view)
    try:
        target = choose_target(spec, load, placed[0])
    except NoRoom as err:
        return f"waits: {err}"
    failed = spec.moved
    why = f" ({failed.reason})" if failed is not None and failed.phase == "undone" and failed.reason else ""
    return f"waits for its turn to go to host {target}{why}"
