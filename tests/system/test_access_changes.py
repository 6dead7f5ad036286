"""Turning etcd's access control on and changing it while the cluster works, and the doors beside its users."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aetcd import rpc

from nbos.etcdserver import etcd_command, find_etcd
from nbos.layout import Layout, UpOptions
from nbos.state import StateDir
from nbos_cluster import access, etcdauth, keys
from nbos_cluster.etcd import Etcd, EtcdError, LeaseGone
from nbos_cluster.etcdauth import AuthError
from nbos_cluster.kv import Snapshot

from .etcdserver import EtcdServer
from .guarded import Guarded, first
from .ports import free_port


async def test_a_second_set_up_changes_nothing_and_a_third_puts_right(guarded: Guarded) -> None:
    async with guarded.client(access.ROOT) as root:
        assert await etcdauth.setup(root, ["a", "b"]) == []
        stub = rpc.AuthStub(root.member.channel)
        too_much = rpc.Permission(permType=rpc.Permission.READWRITE, key=keys.HOSTS.encode(), range_end=b"\0")
        await stub.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name=access.READER, perm=too_much))
        await stub.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=access.READER, role="root"))
        changed = await etcdauth.setup(root, ["a", "b"])
        assert changed == [f"role {access.READER} changed", f"user {access.READER} changed"]
    async with guarded.client(access.READER) as reader:
        with pytest.raises(EtcdError, match="permission denied"):
            await reader.put(keys.host("a"), b"x")


async def test_a_host_that_left_is_shut_out(guarded: Guarded) -> None:
    async with guarded.daemon("b") as (etcd, _):
        async with guarded.client(access.ROOT) as root:
            assert await etcdauth.setup(root, ["a"], ["b"]) == ["user daemon-b removed"]
        with pytest.raises(EtcdError, match="permission denied"):
            await etcd.put(keys.host("b"), b"x")


async def test_changing_roles_disturbs_nobody_at_work(guarded: Guarded) -> None:
    """etcd refuses a request that was on its way while a role changed; the client must repeat it."""
    done = asyncio.Event()

    async def work(etcd: Etcd, lease: int) -> int:
        n = 0
        while not done.is_set():
            await etcd.put(keys.host("a"), b"x", lease)
            await etcd.lease_refresh(lease)
            await etcd.range(keys.HOSTS)
            n += 1
        return n

    async with guarded.daemon("a") as (etcd, lease), guarded.client(access.ROOT) as root:
        workers = [asyncio.create_task(work(etcd, lease)) for _ in range(8)]
        try:
            for n in range(60):
                await etcdauth.setup(root, [f"more-{n}"])
                await etcdauth.setup(root, ["a"], [f"more-{n}"])
        finally:
            done.set()
        assert all(count > 0 for count in await asyncio.gather(*workers))


async def test_nobody_logs_in_with_a_password(guarded: Guarded) -> None:
    """A certificate of the authority and a guess are not enough to become somebody else."""
    async with guarded.client("nobody") as etcd:
        for name in (access.ROOT, access.GATEWAY):
            for password in ("", name):
                request = rpc.AuthenticateRequest(name=name, password=password)
                with pytest.raises(rpc.AioRpcError, match="authentication"):
                    await rpc.AuthStub(etcd.member.channel).Authenticate(request, timeout=5)


async def test_the_admin_looks_after_the_database(guarded: Guarded) -> None:
    async with guarded.client(access.ROOT) as root, guarded.daemon("a") as (etcd, lease):
        await root.compact(await root.put("/x", b""))
        await root.defragment()
        assert await etcd.lease_refresh(lease) > 0
        assert isinstance(await first(etcd, keys.KERNELS), Snapshot)


async def test_a_lease_that_ended_is_told_as_that(guarded: Guarded) -> None:
    async with guarded.client(access.daemon_user("a")) as etcd:
        with pytest.raises(LeaseGone):
            await etcd.lease_refresh(123456)
        await etcd.lease_revoke(123456)


async def test_who_is_not_root_cannot_shut_everybody_out(tls_etcd: EtcdServer) -> None:
    found = Guarded(tls_etcd)
    async with found.client(access.GATEWAY) as etcd:
        with pytest.raises(AuthError, match="common name is 'root'"):
            await etcdauth.check_safe(etcd, found.files(access.GATEWAY))


async def test_an_etcd_that_asks_for_no_certificates_is_not_locked(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path, tls=True)
    server._tls_arguments.remove("--client-cert-auth")
    at = server._tls_arguments.index("--trusted-ca-file")
    del server._tls_arguments[at : at + 2]
    server.start()
    try:
        await server.ready()
        found = Guarded(server)
        async with found.client(access.ROOT) as etcd:
            with pytest.raises(AuthError, match="--client-cert-auth"):
                await etcdauth.check_safe(etcd, found.files(access.ROOT))
    finally:
        server.stop()


@pytest.fixture
async def embedded(tmp_path: Path) -> AsyncIterator[tuple[Path, int, int]]:
    """The etcd of `nbos up`, by its own command: its certificates' folder, its port, its port for members."""
    port, peer = free_port(), free_port()
    layout = Layout(StateDir.at(tmp_path), UpOptions(hosts=1), {"etcd": port, "etcd_peer": peer}, find_etcd())
    layout.state.create()
    layout.make_certificates()
    command = etcd_command(layout.etcd, layout.state.etcd, layout.state.tls, port, peer)
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with Etcd(layout.endpoints, layout.tls("up"), timeout=20.0) as etcd:
            await etcd.status()
        yield layout.state.tls, port, peer
    finally:
        process.kill()
        await process.wait()


async def hello(tls: Path, name: str, port: int) -> bytes:
    """What the member answers to a request of whoever has this certificate. Raises SSLError when it hangs up."""
    context = ssl.create_default_context(cafile=str(tls / "ca.pem"))
    context.load_cert_chain(tls / f"{name}.pem", tls / f"{name}.key")
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return await reader.read(15)
    finally:
        writer.close()


async def test_no_client_becomes_a_member(embedded: tuple[Path, int, int]) -> None:
    """The members' port knows no users: a daemon's certificate must not open it, nor the admin's."""
    tls, _, peer = embedded
    assert (await hello(tls, "etcd", peer)).startswith(b"HTTP/1.1 200")
    for name in ("host-1", "gateway", "up"):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            assert await hello(tls, name, peer) == b"never"


async def test_without_a_certificate_nobody_gets_a_word(guarded: Guarded) -> None:
    host, port = guarded.server.endpoint.split(":")
    context = ssl.create_default_context(cafile=str(guarded.server.directory / "tls" / "ca.pem"))

    async def greet() -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        return await reader.read(1)

    with pytest.raises(ssl.SSLError, match=r"(?i)certificate"):
        await greet()
