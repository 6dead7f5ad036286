"""etcd's users and roles: each process can do all that its code asks for, and nothing else. Against a real etcd."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aetcd import rpc
from msgspec.structs import replace

from gpu_daemon import collecting, transactions
from nbos_cluster import access, election, etcdauth, keys, membership, records, statelog
from nbos_cluster.etcd import Etcd, EtcdError
from nbos_cluster.kernelview import KernelView
from nbos_cluster.kv import Snapshot, Txn, mod_is, op_delete_range, op_put
from nbos_cluster.records import (
    ClaimRecord,
    Collection,
    Epoch,
    GrantRecord,
    LogEntry,
    ReplicaRecord,
)
from nbos_spawner.gateway import accounts

from .etcdserver import eventually
from .guarded import SPEC, Guarded, first

FOLDER = "0" * 32
EPOCH = Epoch(epoch=1, incarnation=1)


async def view(etcd: Etcd) -> KernelView:
    found, revision = await etcd.range(keys.kernel("k"))
    seen = KernelView("k")
    seen.apply(Snapshot(found, revision))
    return seen


# -- what each must be able to do ---------------------------------------------------------------------------------


async def test_a_daemon_can_do_all_that_its_code_asks_for(guarded: Guarded) -> None:
    async with guarded.daemon("a") as (etcd, lease):
        assert await etcd.lease_refresh(lease) > 0
        assert await etcd.lease_alive(lease) > 0
        for prefix in (keys.KERNELS, keys.host("a"), keys.HOSTS, keys.queue("a"), keys.EXPECTED):
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
        await etcd.put(keys.account("a", 1, "j"), b"x")
        await etcd.commit(Txn([], [op_delete_range(keys.accounts("a"), keys.account_hour("a", 2))]))
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
        assert await accounts.read_lines(etcd, 0, 1000) == []
        await etcd.put(keys.expected("ann"), b"x", await etcd.lease_grant(60))
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
        "another host's accounts": put(keys.account("b", 1, "j")),
        "read another host's accounts": read(keys.accounts("b")),
        "another host's queue": put(keys.ticket("b", "t")),
        "say who is expected": put(keys.expected("ann")),
        "read another host's queue": read(keys.queue("b")),
        "hidden in a transaction": hidden_in_a_transaction,
    },
    access.GATEWAY: {
        **MANAGE,
        "a host's record": put(keys.host("a")),
        "a grant": put(keys.grant("a", "g")),
        "a ticket": put(keys.ticket("a", "t")),
        "accounts": put(keys.account("a", 1, "j")),
        "the fence of collecting": put(keys.gc_fence(FOLDER)),
        "read fences": read(keys.GC),
        "hidden in a transaction": hidden_in_a_transaction,
    },
    access.READER: {
        **MANAGE,
        "read kernels": read(keys.KERNELS),
        "read accounts": read(keys.ACCOUNTS),
        "read who is expected": read(keys.EXPECTED),
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
