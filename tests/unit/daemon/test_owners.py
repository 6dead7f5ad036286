"""Whose a process on a GPU is."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from gpu_daemon.fleet import ReplicaId
from gpu_daemon.owners import Owners
from nbos_cluster.records import GPUProcess


def owners(pid: int) -> Owners:
    """Of a host whose one replica is the process `pid`."""
    replica = SimpleNamespace(id=ReplicaId("k", 2), handle=SimpleNamespace(pid=pid, container=""))
    view = SimpleNamespace(spec=SimpleNamespace(owner="ada"))
    site: Any = SimpleNamespace(replicas={replica.id: replica}, view=lambda kernel: view)
    return Owners(site)


def test_what_a_replica_started_is_its_owners() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = owners(os.getpid()).of(GPUProcess(pid=child.pid, memory=5))
        assert (found.kernel, found.replica, found.owner, found.memory) == ("k", 2, "ada", 5)
        assert owners(child.pid).of(GPUProcess(pid=os.getpid())).kernel == ""
        child.communicate(b"\n")


def test_a_process_that_is_gone_is_nobodys() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert owners(os.getpid()).of(GPUProcess(pid=child.pid)) == GPUProcess(pid=child.pid)
