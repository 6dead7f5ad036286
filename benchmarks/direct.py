"""Kernels driven by jupyter_client in this very process: a plain one, and one of NBOS behind its router.

Guarantees: the client of both sides is the same class with the same settings; the kernel has ended when the
block ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from measure import PLAIN_KERNEL, Running

from tests.system.nbosenv import kernel_environment, kernelspec_name


@contextlib.contextmanager
def running_kernel(name: str, env: dict[str, str] | None = None) -> Iterator[BlockingKernelClient]:
    """A new kernel by the name of its kernelspec, with a client whose channels are open and that has
    answered once.
    """
    with changed_environment(env or {}):
        manager = KernelManager(kernel_name=name)
        arguments: dict[str, Any] = {} if env is None else {"env": dict(os.environ)}
        manager.start_kernel(**arguments)
        client: BlockingKernelClient = manager.client()
        try:
            client.start_channels()
            client.wait_for_ready(timeout=60)
            yield client
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


@contextlib.contextmanager
def changed_environment(env: dict[str, str]) -> Iterator[None]:
    """The provisioner reads the environment of the process it runs in, as it does in a Jupyter Server."""
    before = {key: os.environ.get(key) for key in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def direct_plain() -> Iterator[BlockingKernelClient]:
    with running_kernel(PLAIN_KERNEL) as client:
        yield client


@contextlib.contextmanager
def direct_nbos(hub: Running) -> Iterator[BlockingKernelClient]:
    """A kernel of NBOS, as the Jupyter Server of user `direct` would start it."""
    env = nbos_environment(hub)
    with running_kernel(kernelspec_name(env), env) as client:
        yield client


def nbos_environment(hub: Running) -> dict[str, str]:
    return asyncio.run(kernel_environment(hub.hub, "direct"))


def is_idle(message: dict[str, Any]) -> bool:
    return bool(message["msg_type"] == "status" and message["content"]["execution_state"] == "idle")
