"""The provisioner and the kernel manager in a Jupyter Server's place, with a gateway played by the test."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.provisioning import KernelProvisionerFactory

from nbos_provisioner.extension import KERNELS
from nbos_provisioner.gateway import GatewayError
from nbos_provisioner.kernelmanager import NBOSKernelManager

from .fake_gateway import TOKEN, FakeGateway

ID = "11111111-2222-3333-4444-555555555555"


@pytest.fixture
async def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeGateway]:
    name, where = "nbos-provisioner", "nbos_provisioner.provisioner:NBOSProvisioner"
    entry = EntryPoint(name, where, KernelProvisionerFactory.GROUP_NAME)
    monkeypatch.setitem(KernelProvisionerFactory.instance().provisioners, name, entry)
    fake = FakeGateway(tmp_path)
    monkeypatch.setenv("NBOS_GATEWAY_URL", fake.url)
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", TOKEN)
    monkeypatch.setenv("NBOS_REPLICAS", "2")
    monkeypatch.setenv("NBOS_RESOURCES", '{"gpus": 1}')
    yield fake
    # Explicitly: a zmq context that the garbage collector ends while its sockets are open blocks for ever.
    while MADE:
        kernels = MADE.pop()
        await kernels.shutdown_all()
        kernels.context.destroy(linger=0)
    fake.close()


MADE: list[NBOSKernelManager] = []


def manager(tmp_path: Path) -> NBOSKernelManager:
    specs = KernelSpecManager()
    specs.kernel_dirs = [*specs.kernel_dirs, str(KERNELS)]
    MADE.append(NBOSKernelManager(kernel_spec_manager=specs, connection_dir=str(tmp_path), root_dir=str(tmp_path)))
    return MADE[-1]


async def ask(km: Any, code: str) -> str:
    """What a cell prints."""
    client = km.client(client_class="jupyter_client.asynchronous.AsyncKernelClient")
    client.start_channels()
    printed: list[str] = []
    try:
        await client.wait_for_ready(timeout=30)
        await client.execute_interactive(
            code,
            timeout=30,
            output_hook=lambda m: printed.append(m["content"].get("text") or m["content"].get("evalue", "")),
        )
    finally:
        client.stop_channels()
    return "".join(printed).strip()


async def until(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def test_start_run_restart_and_shut_down(gateway: FakeGateway, tmp_path: Path) -> None:
    kernels = manager(tmp_path)
    await kernels.start_kernel(kernel_id=ID, kernel_name="nbos-python3", cwd="/somewhere")
    km = kernels.get_kernel(ID)
    assert gateway.requests[ID]["replicas"] == 2
    assert gateway.requests[ID]["resources"] == {"gpus": 1}
    assert await ask(km, "x = 41; print(x + 1)") == "42"
    ports = km.ports
    await kernels.restart_kernel(ID)
    assert km.ports == ports
    assert await ask(km, "print('x' in globals())") == "False"
    await kernels.shutdown_kernel(ID)
    assert gateway.kernels == {}
    assert gateway.calls["restart"] == gateway.calls["delete"] == 1


async def test_a_kernel_outlives_the_server(gateway: FakeGateway, tmp_path: Path) -> None:
    first = manager(tmp_path)
    await first.start_kernel(kernel_id=ID, kernel_name="nbos-python3")
    assert await ask(first.get_kernel(ID), "x = 7; print(x)") == "7"
    await first.shutdown_all()
    assert ID not in first
    assert ID in gateway.kernels
    second = manager(tmp_path)
    assert await second.adopt() == [ID]
    assert await ask(second.get_kernel(ID), "print(x)") == "7"
    await second.shutdown_kernel(ID, now=True)
    assert gateway.kernels == {}


async def test_each_server_of_a_user_takes_up_its_own_kernels(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTERHUB_SERVER_NAME", "second")
    first = manager(tmp_path)
    await first.start_kernel(kernel_id=ID, kernel_name="nbos-python3")
    await first.shutdown_all()
    monkeypatch.delenv("JUPYTERHUB_SERVER_NAME")
    assert await manager(tmp_path).adopt() == []
    monkeypatch.setenv("JUPYTERHUB_SERVER_NAME", "second")
    again = manager(tmp_path)
    assert await again.adopt() == [ID]
    await again.shutdown_kernel(ID, now=True)


async def test_a_dead_router_is_started_again_with_its_ports(gateway: FakeGateway, tmp_path: Path) -> None:
    kernels = manager(tmp_path)
    await kernels.start_kernel(kernel_id=ID, kernel_name="nbos-python3")
    km = kernels.get_kernel(ID)
    assert await ask(km, "x = 7; print(x)") == "7"
    router = km.provisioner._router
    was = router.pid
    os.kill(was, signal.SIGKILL)
    await until(lambda: router.pid != was)
    assert await km.provisioner.poll() is None
    assert await ask(km, "print(x)") == "7"
    await kernels.shutdown_kernel(ID)


async def test_the_gateway_is_not_asked_while_a_kernel_runs(gateway: FakeGateway, tmp_path: Path) -> None:
    kernels = manager(tmp_path)
    await kernels.start_kernel(kernel_id=ID, kernel_name="nbos-python3")
    km = kernels.get_kernel(ID)
    await ask(km, "1")
    asked = gateway.calls.total()
    await ask(km, "import time; time.sleep(1.5)")
    assert gateway.calls.total() == asked
    gateway.server.stop()
    assert await km.provisioner.poll() is None
    assert await ask(km, "print(1)") == "1"


async def test_a_blocking_manager_gets_answers_before_and_after_a_failover(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    """Its event loop runs only within its own calls: what follows the kernel's members must not live there."""
    specs = KernelSpecManager()
    specs.kernel_dirs = [*specs.kernel_dirs, str(KERNELS)]
    gateway.ready = False

    def use() -> list[str]:
        file = str(tmp_path / "kernel.json")
        km = KernelManager(kernel_name="nbos-python3", kernel_spec_manager=specs, connection_file=file)
        km.start_kernel(kernel_id=ID)
        client = km.client()
        client.start_channels()
        try:
            said = []
            gateway.ready = True
            for _ in range(2):
                msg_id = client.execute("1")
                while (reply := client.get_shell_msg(timeout=30))["parent_header"].get("msg_id") != msg_id:
                    pass
                said.append(reply["content"]["status"])
                gateway.end(ID)
                gateway.start(ID)
            return said
        finally:
            client.stop_channels()
            km.shutdown_kernel(now=True)
            km.context.destroy(linger=0)

    assert await asyncio.to_thread(use) == ["ok", "ok"]


async def test_a_refused_token_is_said_in_the_gateways_words(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "wrong")
    with pytest.raises(GatewayError, match="this token is not known"):
        await manager(tmp_path).start_kernel(kernel_id=ID, kernel_name="nbos-python3")


async def test_a_gateway_that_is_away_is_named_with_a_way_out(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBOS_GATEWAY_URL", "http://127.0.0.1:9/services/nbos/")
    monkeypatch.setattr("nbos_provisioner.gateway.PATIENCE", 0.5)
    with pytest.raises(GatewayError, match=r"http://127.0.0.1:9/services/nbos/ cannot be reached.*nbos status"):
        await manager(tmp_path).start_kernel(kernel_id=ID, kernel_name="nbos-python3")
