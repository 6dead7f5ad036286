"""Kernels driven by jupyter_client in this very process: a plain one, and one of NBOS behind its router.

Guarantees: the client of both sides is the same class with the same settings; the kernel has ended when the
block ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import AsyncKernelManager
from measure import PLAIN_KERNEL, Running

from nbos_provisioner.kernelmanager import NBOSKernelManager
from tests.system.nbosenv import kernel_environment, kernelspec_name

T = TypeVar("T")

OWNER = "direct"
"""Whose kernels these are."""


@dataclass(frozen=True)
class Kernels:
    """Kernel managers on a running event loop of their own, as a Jupyter Server keeps them; clients are blocking."""

    loop: asyncio.AbstractEventLoop
    server: NBOSKernelManager
    """Has a router wait, as in a Jupyter Server with the extension."""

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(120)

    def router_waits(self, timeout: float = 30.0) -> None:
        """Until one does."""
        deadline = time.monotonic() + timeout
        while self.server.nbos_spare_router is None or not self.server.nbos_spare_router.pid:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no router waits after {timeout:g} s")
            time.sleep(0.05)

    @contextlib.contextmanager
    def started(self, name: str) -> Iterator[BlockingKernelClient]:
        """A new kernel by the name of its kernelspec, and a client with open channels. Nothing was asked of it yet."""
        manager = AsyncKernelManager(kernel_name=name, parent=self.server)
        self.run(manager.start_kernel())
        client = BlockingKernelClient()
        client.load_connection_info(manager.get_connection_info())
        client.start_channels()
        try:
            yield client
        finally:
            client.stop_channels()
            self.run(manager.shutdown_kernel(now=True))


@contextlib.contextmanager
def kernels() -> Iterator[Kernels]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="kernel managers")
    thread.start()
    here = Kernels(loop, NBOSKernelManager())
    loop.call_soon_threadsafe(here.server.prepare_router)
    try:
        yield here
    finally:
        here.run(here.server.shutdown_all())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextlib.contextmanager
def running_kernel(name: str, env: dict[str, str]) -> Iterator[BlockingKernelClient]:
    """A kernel that has answered once."""
    with changed_environment(env), kernels() as here, here.started(name) as client:
        client.wait_for_ready(timeout=60)
        yield client


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
    with running_kernel(PLAIN_KERNEL, {}) as client:
        yield client


@contextlib.contextmanager
def direct_nbos(hub: Running, replicas: int = 3) -> Iterator[BlockingKernelClient]:
    """A kernel of NBOS, as the Jupyter Server of user `direct` would start it."""
    env = nbos_environment(hub, replicas)
    with running_kernel(kernelspec_name(env), env) as client:
        yield client


def nbos_environment(hub: Running, replicas: int = 3) -> dict[str, str]:
    return asyncio.run(kernel_environment(hub.hub, OWNER, replicas))


def is_idle(message: dict[str, Any]) -> bool:
    return bool(message["msg_type"] == "status" and message["content"]["execution_state"] == "idle")
