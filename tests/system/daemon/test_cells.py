"""A cell's life on real processes: bid, claim, entry, standby; restarts by the user, deletion, racing hosts."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from nbos.etcdserver import COMPACTION
from nbos_cluster import keys, membership
from nbos_cluster.etcd import Etcd
from nbos_cluster.statelog import FOLD_ENTRIES, LAG_FACTOR
from tests.system.daemon.conftest import MakeHost
from tests.system.daemon.site import create, grants_of, kernel_spec, view_of
from tests.system.etcdserver import EtcdServer, eventually

MANY = 1500
"""Cells of the test that etcd stays small: enough for two dozen folds."""


async def test_a_cell_is_bid_for_claimed_and_appended_and_the_standby_gets_its_entry(
    client: Etcd, host: MakeHost
) -> None:
    a, b = host("a"), host("b")
    await create(client, kernel_spec("k", "a", "b"))
    first, second = a.replica("k", 0), b.replica("k", 1)
    await first.ready()
    await second.ready()
    answer = await first.bid(1)
    assert answer["answer"] == "lead"
    assert answer["grant"] is None
    assert (await second.bid(1))["code"] == "taken"
    assert (await first.append(1, answer["token"]))["ok"]
    await second.ready(applied=1)
    assert (await second.bid(1))["code"] == "stale"
    assert [m["n"] for m in await first.pushed("entry")] == [0]
    view = await view_of(client, "k")
    assert (view.last, view.claims, view.log[1].replica) == (1, {}, 0)


async def test_a_replica_killed_with_a_claim_is_abandoned_with_the_reason_and_started_again(
    client: Etcd, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    before = await replica.ready()
    assert (await replica.bid(1, gpus=2))["answer"] == "lead"
    os.kill(before["pid"], signal.SIGKILL)

    async def abandoned() -> bool:
        return (await view_of(client, "k")).last == 1

    await eventually(abandoned, "execution 1 abandoned", 2)
    entry = (await view_of(client, "k")).log[1]
    assert entry.kind == "abandoned"
    assert "SIGKILL" in entry.reason
    assert "out-of-memory" in entry.reason
    assert await grants_of(client, "a") == []
    after = await replica.ready(applied=1)
    assert after["pid"] != before["pid"]
    assert (await replica.bid(2, gpus=2))["answer"] == "lead"


async def test_a_replica_killed_between_cells_is_back_with_its_state_and_its_ports(
    client: Etcd, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    before = await replica.ready()

    async def published() -> bool:
        return (await view_of(client, "k")).replicas[0].state == "ready"

    await eventually(published, "its record says ready")
    ports = (await view_of(client, "k")).replicas[0].ports
    assert (await replica.append(1, (await replica.bid(1))["token"]))["ok"]
    os.kill(before["pid"], signal.SIGKILL)

    async def back() -> bool:
        state = await replica.order()
        return bool(state) and state["pid"] != before["pid"] and state["applied"] == 1

    await eventually(back, "the replica is back", 3)
    view = await view_of(client, "k")
    assert view.log[1].kind == "cell"
    record = view.replicas[0]
    assert (record.state, record.ports) == ("ready", ports)


async def test_of_two_hosts_that_bid_at_once_exactly_one_leads(client: Etcd, host: MakeHost) -> None:
    a, b = host("a"), host("b")
    await create(client, kernel_spec("k", "a", "b"))
    replicas = [a.replica("k", 0), b.replica("k", 1)]
    for replica in replicas:
        await replica.ready()
    for n in range(1, 21):
        answers = await asyncio.gather(*(r.bid(n, gpus=1) for r in replicas))
        winners = [i for i, answer in enumerate(answers) if answer["answer"] == "lead"]
        assert len(winners) == 1, answers
        assert (await replicas[winners[0]].append(n, answers[winners[0]]["token"]))["ok"]
        for replica in replicas:
            await replica.ready(applied=n)
    assert await grants_of(client, "a") == await grants_of(client, "b") == []


async def test_a_restart_by_the_user_replaces_the_processes_and_a_deletion_ends_them(
    client: Etcd, host: MakeHost
) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    before = await replica.ready()
    assert (await replica.bid(1))["answer"] == "lead"
    assert (await client.commit(membership.restart(await view_of(client, "k")))).succeeded

    async def replaced() -> bool:
        state = await replica.order()
        return bool(state) and state["pid"] != before["pid"] and state["hello"].get("incarnation") == 2

    await eventually(replaced, "a new process of incarnation 2", 5)
    after = await replica.ready(applied=1)
    await client.commit(membership.delete("k"))
    await eventually(lambda: not Path(f"/proc/{after['pid']}").exists(), "the process ends", 4)
    await eventually(lambda: not a.folder("k", 0).exists(), "its folder is gone", 2)
    assert (await client.range("/nbos/v1/kernels/"))[0] == []


async def test_a_restart_while_a_process_is_being_started_replaces_that_one_too(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    await replica.ready()
    done = 0
    # One after the other without a pause, so that some fall between the start of a process and its being there.
    async with asyncio.timeout(30):
        while a.log.read_text().count("started as process") < 4:
            assert (await client.commit(membership.restart(await view_of(client, "k")))).succeeded
            done += 1

    async def replaced() -> bool:
        state = await replica.order()
        return bool(state) and state["hello"].get("incarnation") == done + 1

    await eventually(replaced, "a process of the last incarnation", 10)


async def test_the_log_is_folded_and_a_new_replica_starts_from_the_checkpoint(client: Etcd, host: MakeHost) -> None:
    a = host("a")
    await create(client, kernel_spec("k", "a"))
    replica = a.replica("k", 0)
    pid = (await replica.ready())["pid"]
    for n in range(1, 81):
        assert (await replica.append(n, (await replica.bid(n))["token"], source="x"))["ok"]

    async def folded() -> bool:
        view = await view_of(client, "k")
        return view.checkpoint is not None and len(view.log) <= 64

    await eventually(folded, "the log is folded", 5)
    os.kill(pid, signal.SIGKILL)
    await replica.ready(applied=80)
    assert len(await replica.pushed("state")) == 1


@pytest.mark.timeout(240)
async def test_after_many_cells_etcd_holds_little_of_a_kernel(etcd: EtcdServer, host: MakeHost) -> None:
    etcd.stop()
    etcd.arguments = (COMPACTION[0], "--auto-compaction-retention=5s")  # as `nbos up` does, only sooner
    etcd.start()
    await etcd.ready()
    a, b = host("a"), host("b")
    async with etcd.client() as client:
        await create(client, kernel_spec("k", "a", "b"))
        first, second = a.replica("k", 0), b.replica("k", 1)
        await first.ready()
        await second.ready()
        await first.order(seconds=180, cells=[1, MANY])
        await second.ready(applied=MANY)

        async def folded() -> bool:
            # The double of the standby never says how far it has come, so a fold waits for it as long as it may.
            return len((await view_of(client, "k")).log) <= (LAG_FACTOR + 1) * FOLD_ENTRIES

        await eventually(folded, "the log is folded", 10)
        held = sum(len(kv.key) + len(kv.value) for kv in (await client.range(keys.kernel("k")))[0])
        assert held < 300_000

        async def compacted() -> bool:
            return int((await client.status())["db_in_use"]) < 1_000_000

        await eventually(compacted, "old revisions are gone, so that etcd has less than 1 MB in use", 90)
        await client.defragment()
        assert (await client.status())["db_size"] < 1_000_000


async def test_outcome_and_status_tell_what_became_of_an_execution(client: Etcd, host: MakeHost) -> None:
    a, b = host("a"), host("b")
    await create(client, kernel_spec("k", "a", "b"))
    first, second = a.replica("k", 0), b.replica("k", 1)
    await first.ready()
    await second.ready()
    assert (await second.send("outcome", n=1, abandon=False))["state"] == "free"
    token = (await first.bid(1))["token"]
    claimed = await second.send("outcome", n=1, abandon=True)
    assert (claimed["state"], claimed["replica"], claimed["host"]) == ("claimed", 0, "a")
    await first.append(1, token, status="error")
    committed = await second.send("outcome", n=1, abandon=True)
    assert (committed["state"], committed["status"], committed["execution_count"]) == ("committed", "error", 1)
    abandoned = await second.send("outcome", n=2, abandon=True)
    assert abandoned["state"] == "abandoned"
    assert (await first.bid(2))["code"] == "stale"
    status = await second.send("status")
    assert (status["last"], status["next"], status["executor"]) == (2, 3, 0)
    assert {h["name"] for h in status["hosts"]} == {"a", "b"}
    assert [m["index"] for m in status["members"]["members"]] == [0, 1]
