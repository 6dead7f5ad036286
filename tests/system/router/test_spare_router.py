"""A router that waits for the next notebook: handed out once, only while it lives, and gone with its server."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from nbos_provisioner import spare_router
from nbos_provisioner.kernelmanager import NBOSKernelManager
from nbos_provisioner.spare_router import SpareRouter, end_router, start_router

from .fake_gateway import FakeGateway
from .test_provisioner import ID, ask, gateway, manager, until

__all__ = ["gateway"]  # a fixture


async def prepared(tmp_path: Path) -> tuple[NBOSKernelManager, SpareRouter]:
    """A server with a router that waits."""
    kernels = manager(tmp_path)
    kernels.prepare_router()
    spare = kernels.nbos_spare_router
    assert spare is not None
    await until(lambda: spare.pid)
    return kernels, spare


async def test_a_kernel_gets_the_router_that_waits_and_the_next_one_is_started(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_router, "REFILL_AFTER", 0.0)
    kernels, spare = await prepared(tmp_path)
    waited = spare.pid
    await kernels.start_kernel(kernel_id=ID, kernel_name="nbos-python3")
    router = kernels.get_kernel(ID).provisioner._router
    assert router.pid == waited
    assert await ask(kernels.get_kernel(ID), "print(6 * 7)") == "42"
    await until(lambda: spare.pid)
    assert spare.pid != waited
    os.kill(waited, signal.SIGKILL)  # one that dies is followed by the one that waits
    waited = spare.pid
    await until(lambda: router.pid == waited)
    assert await ask(kernels.get_kernel(ID), "print(6 * 7)") == "42"


async def test_a_router_that_died_while_it_waited_is_given_to_no_kernel(gateway: FakeGateway, tmp_path: Path) -> None:
    kernels, spare = await prepared(tmp_path)
    dead = spare.pid
    os.kill(dead, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(dead)], timeout=10)  # without the event loop's knowing
    await kernels.start_kernel(kernel_id=ID, kernel_name="nbos-python3")
    assert kernels.get_kernel(ID).provisioner._router.pid != dead
    assert await ask(kernels.get_kernel(ID), "print(6 * 7)") == "42"


async def test_the_router_that_waits_ends_with_its_server_and_so_does_one_that_is_just_started(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    kernels, spare = await prepared(tmp_path)
    waited = psutil.Process(spare.pid)
    await kernels.shutdown_all()
    assert not waited.is_running()
    before = set(psutil.Process().children())
    kernels.prepare_router()
    await kernels.shutdown_all()
    assert set(psutil.Process().children()) == before


async def test_a_router_that_no_kernel_needed_ends_by_itself_once_its_stdin_closes() -> None:
    router = await start_router()
    await end_router(router, patience=30)
    assert router.returncode == 0
