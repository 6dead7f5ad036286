"""etcd's users and roles: each process can do all that its code asks for, and nothing else. Against a real etcd."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aetcd import rpc
from msgspec.structs import replace

from gpu_daemon import collecting, transactions
from nbos.etcdserver import etcd_command, find_etcd
from nbos.layout import Layout, UpOptions
from nbos.state import StateDir
from nbos_cluster import access, certs, election, etcdauth, keys, membership, records, statelog
from nbos_cluster.etcd import Etcd, EtcdError, LeaseGone, TLSFiles
from nbos_cluster.etcdauth import AuthError
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import Snapshot, Txn, mod_is, op_put
from nbos_cluster.records import (
    ClaimRecord,
    Collection,
    Epoch,
    GrantRecord,
    HostRecord,
    LogEntry,
    ReplicaRecord,
)
from tests.system.daemon.site import kernel_spec

from .etcdserver import EtcdServer, eventually, free_port

FOLDER = "0" * 32
SPEC = kernel_spec("k", "a", "b")
EPOCH = Epoch(epoch=1, incarnation=1)


@dataclass
class Guarded:
    """An etcd with access control on."""

    server: EtcdServer

    def files(self, common: str) -> TLSFiles:
        place = self.server.directory / "tls"
        return TLSFiles(place / "ca.pem", *certs.issue(place, f"client-{common}", common=common))

    def client(self, common: str) -> Etcd:
        return Etcd([self.server.endpoint], self.files(common))

    @asynccontextmanager
    async def daemon(self, host: str) -> AsyncIterator[tuple[Etcd, int]]:
        """A daemon's connection with its lease, under which its host record stands."""
        async with self.client(access.daemon_user(host)) as etcd:
            lease = await etcd.lease_grant(60)
            await etcd.put(keys.host(host), records.encode(HostRecord(name=host, address=host, pid=1)), lease)
            yield etcd, lease


@pytest.fixture
async def guarded(tls_etcd: EtcdServer) -> AsyncIterator[Guarded]:
    found = Guarded(tls_etcd)
    files = found.files(access.ROOT)
    async with found.client(access.ROOT) as root:
        await etcdauth.check_safe(root, files)
        await etcdauth.setup(root, ["a", "b"])
        await root.commit(membership.create(SPEC))
        yield found


async def view(etcd: Etcd) -> KernelView:
    found, revision = await etcd.range(keys.kernel("k"))
    seen = KernelView("k")
    seen.apply(Snapshot(found, revision))
    return seen


async def first(etcd: Etcd, prefix: str) -> Any:
    """The first thing that a watch tells, and one change that it would have told."""
    found = etcd.watch(prefix)
    try:
        return await anext(found)
    finally:
        await found.aclose()  # type: ignore[attr-defined]


# -- what each must be able to do ---------------------------------------------------------------------------------


async def test_a_daemon_can_do_all_that_its_code_asks_for(guarded: Guarded) -> None:
    async with guarded.daemon("a") as (etcd, lease):
        assert await etcd.lease_refresh(lease) > 0
        assert await etcd.lease_alive(lease) > 0
        for prefix in (keys.KERNELS, keys.host("a"), keys.HOSTS, keys.queue("a")):
            assert isinstance(await first(etcd, prefix), Snapshot)
        await etcd.range(keys.grants("a"))
        await etcd.put(keys.ticket("a", "t"), b"x", lease)
        await etcd.delete(keys.ticket("a", "t"))
        replica = ReplicaRecord(index=0, host="a", state="ready")
        spec_rev = (await view(etcd)).spec_rev
        guard = Txn([mod_is(keys.spec("k"), spec_rev)], [op_put(keys.replica("k", 0), records.encode(replica), lease)])
        assert (await etcd.commit(guard)).succeeded
        await run_a_cell(etcd, lease, 1)
        await run_a_cell(etcd, lease, 2)
        checkpoint = statelog.fold(None, (await view(etcd)).entries(0, 1))
        assert (await etcd.commit(statelog.fold_txn("k", 0, checkpoint, 1))).succeeded
        await collect(etcd, lease)
        await etcd.txn([], [op_put(keys.GC_STORE, b"id")])
        await etcd.status()
        await etcd.lease_revoke(lease)
        assert await etcd.get(keys.host("a")) is None


async def run_a_cell(etcd: Etcd, lease: int, n: int) -> None:
    """Claimed with a grant, appended; and once claimed, withdrawn and abandoned before."""
    claim = ClaimRecord(n=n, replica=0, host="a", grant="g")
    grant = GrantRecord(grant="g", host="a", owner="ann", kernel="k", replica=0, n=n, shares=())
    won = election.classify(
        n, await etcd.commit(election.claim("k", n, epoch=EPOCH, claim=claim, grant=grant, lease=lease))
    )
    assert isinstance(won, election.Won)
    assert (await etcd.commit(transactions.withdraw("k", n, won.token, grant))).succeeded
    renewed = await etcd.commit(election.renew_claim("k", n, epoch=EPOCH, claim=claim, grant=grant, lease=lease))
    assert renewed.succeeded
    if n == 1:
        entry = LogEntry(n=n, kind="cell", token=renewed.revision, replica=0)
        txn = election.append("k", entry, renewed.revision, grant_key=keys.grant("a", "g"))
        fence = collecting.read_fence(FOLDER, (await etcd.commit(collecting.look(FOLDER))).responses)
        assert (await etcd.commit(collecting.fenced(FOLDER, fence, txn))).succeeded
    else:
        ended = transactions.abandon_held("k", n, renewed.revision, "why", grant=grant, incarnation=1, at=0.0)
        assert (await etcd.commit(ended)).succeeded
    await etcd.commit(transactions.end_grant(grant))


async def collect(etcd: Etcd, lease: int) -> None:
    fence = collecting.read_fence(FOLDER, (await etcd.commit(collecting.look(FOLDER))).responses)
    token = collecting.begun(await etcd.commit(collecting.begin(FOLDER, fence, "a", lease, None)))
    assert token is not None
    assert (await etcd.commit(collecting.still_ours(FOLDER, token))).succeeded
    assert (await etcd.commit(collecting.end(FOLDER, token, Collection(host="a")))).succeeded
    await etcd.range(keys.GC)


async def test_the_gateway_can_do_all_that_its_code_asks_for(guarded: Guarded) -> None:
    async with guarded.client(access.GATEWAY) as etcd:
        for prefix in (keys.HOSTS, keys.QUEUES, keys.KERNELS):
            assert isinstance(await first(etcd, prefix), Snapshot)
        await etcd.status()
        other = replace(SPEC, kernel="other")
        made = membership.classify_create(other, await etcd.commit(membership.create(other)))
        assert isinstance(made, membership.Created)
        assert (await etcd.commit(membership.replan(await view(etcd), {"0": "b"}))).succeeded
        seen = await view(etcd)
        assert seen.spec is not None
        assert (await etcd.commit(membership.respec(seen, replace(seen.spec, durable=True)))).succeeded
        assert (await etcd.commit(membership.restart(await view(etcd)))).succeeded
        assert (await etcd.commit(membership.delete("k", (await view(etcd)).born))).succeeded
        assert (await etcd.range(keys.kernel("k")))[0] == []


async def test_a_reader_sees_hosts_and_queues(guarded: Guarded) -> None:
    async with guarded.client(access.READER) as etcd:
        for prefix in (keys.HOSTS, keys.QUEUES, keys.GC):
            assert isinstance(await first(etcd, prefix), Snapshot)


# -- what is refused ----------------------------------------------------------------------------------------------

Try = Callable[[Etcd], Awaitable[Any]]


def auth(method: str, request: Any) -> Try:
    return lambda etcd: getattr(rpc.AuthStub(etcd.member.channel), method)(request, timeout=5)


def put(key: str) -> Try:
    return lambda etcd: etcd.put(key, b"x")


def read(prefix: str) -> Try:
    return lambda etcd: etcd.range(prefix)


def everything(etcd: Etcd) -> Awaitable[Any]:
    return etcd.member.kvstub.Range(rpc.RangeRequest(key=b"\0", range_end=b"\0"), timeout=5)


async def snapshot(etcd: Etcd) -> Any:
    async for part in etcd.member.maintenancestub.Snapshot(rpc.SnapshotRequest(), timeout=5):
        return part


async def hidden_in_a_transaction(etcd: Etcd) -> Any:
    """The branch that is not taken counts as well."""
    return await etcd.txn([mod_is(keys.spec("k"), 10**9)], [op_put(keys.host("b"), b"x")], [])


async def compare_only(etcd: Etcd) -> Any:
    """Comparing is a way of reading: it must not tell what stands in a secret."""
    return await etcd.txn([mod_is(keys.spec("k"), 1)], [])


MANAGE: dict[str, Try] = {
    "add a user": auth("UserAdd", rpc.AuthUserAddRequest(name="me", password="x")),
    "take a role": auth("UserGrantRole", rpc.AuthUserGrantRoleRequest(user=access.GATEWAY, role="root")),
    "widen a role": auth("RoleGrantPermission", rpc.AuthRoleGrantPermissionRequest(
        name=access.READER, perm=rpc.Permission(permType=rpc.Permission.READWRITE, key=b"\0", range_end=b"\0"))),
    "turn access control off": auth("AuthDisable", rpc.AuthDisableRequest()),
    "copy the whole database": snapshot,
    "stop a member to defragment it": lambda etcd: etcd.defragment(),
    "remove a member": lambda etcd: rpc_cluster(etcd).MemberRemove(rpc.MemberRemoveRequest(ID=1), timeout=5),
    "read everything": everything,
    "read outside of NBOS": read("/other/"),
    "write outside of NBOS": put("/other/x"),
}  # fmt: skip


def rpc_cluster(etcd: Etcd) -> Any:
    from aetcd.rpc.rpc_pb2_grpc import ClusterStub

    return ClusterStub(etcd.member.channel)


REFUSED: dict[str, dict[str, Try]] = {
    access.daemon_user("a"): {
        **MANAGE,
        "another host's record": put(keys.host("b")),
        "remove another host": lambda etcd: etcd.delete(keys.host("b")),
        "remove all hosts": lambda etcd: etcd.delete_prefix(keys.HOSTS),
        "a host whose name begins like its own": put(keys.host("ab")),
        "another host's grant": put(keys.grant("b", "g")),
        "another host's queue": put(keys.ticket("b", "t")),
        "read another host's queue": read(keys.queue("b")),
        "hidden in a transaction": hidden_in_a_transaction,
    },
    access.GATEWAY: {
        **MANAGE,
        "a host's record": put(keys.host("a")),
        "a grant": put(keys.grant("a", "g")),
        "a ticket": put(keys.ticket("a", "t")),
        "the fence of collecting": put(keys.gc_fence(FOLDER)),
        "read fences": read(keys.GC),
        "hidden in a transaction": hidden_in_a_transaction,
    },
    access.READER: {
        **MANAGE,
        "read kernels": read(keys.KERNELS),
        "read one kernel's keys": lambda etcd: etcd.get(keys.spec("k")),
        "compare a secret": compare_only,
        "write a host": put(keys.host("a")),
        "write a kernel": put(keys.spec("k")),
    },
    # A certificate of the authority whose name is nobody's, and a member's own.
    "nobody": {**MANAGE, "read hosts": read(keys.HOSTS), "write a kernel": put(keys.spec("k"))},
    access.MEMBER: {**MANAGE, "read hosts": read(keys.HOSTS), "write a kernel": put(keys.spec("k"))},
}


@pytest.mark.parametrize("user", REFUSED)
async def test_everything_else_is_refused(guarded: Guarded, user: str) -> None:
    async with guarded.daemon("b"), guarded.client(user) as etcd, guarded.client(access.ROOT) as root:
        before = (await root.range("/"))[0]
        went_through = []
        for what, attempt in REFUSED[user].items():
            try:
                await attempt(etcd)
            except (EtcdError, rpc.AioRpcError) as err:
                if any(text in str(err) for text in ("permission denied", "user not found", "user name not found")):
                    continue
                went_through.append(f"{what}: {err}")
            else:
                went_through.append(what)
        assert went_through == []
        assert (await root.range("/"))[0] == before


async def test_no_daemon_ends_or_uses_another_ones_lease(guarded: Guarded) -> None:
    async with guarded.daemon("a") as (etcd, _), guarded.daemon("b") as (_, theirs):
        with pytest.raises(EtcdError, match="permission denied"):
            await etcd.lease_revoke(theirs)
        with pytest.raises(EtcdError, match="permission denied"):
            await etcd.put(keys.ticket("a", "t"), b"x", theirs)


async def test_a_watch_that_is_not_allowed_goes_on_once_it_is(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "nbos_cluster.watch")
    async with guarded.client(access.daemon_user("new")) as etcd, guarded.client(access.ROOT) as root:
        told = asyncio.create_task(first(etcd, keys.KERNELS))
        await eventually(lambda: "nbos etcd-setup" in caplog.text, "the refusal is told, with the way out")
        assert not told.done()
        await etcdauth.setup(root, ["new"])
        assert isinstance(await asyncio.wait_for(told, 20), Snapshot)


# -- turning it on and changing it ----------------------------------------------------------------------------------


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
                with pytest.raises(rpc.AioRpcError, match="authentication"):
                    await auth("Authenticate", rpc.AuthenticateRequest(name=name, password=password))(etcd)


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
