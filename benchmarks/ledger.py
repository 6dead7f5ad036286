"""What a decision about GPUs costs inside the daemon: 64 devices of 66 TPCs, 500 grants open.

CPU time of this thread, so that a shared machine does not matter: ledger (fit, reserve, release), queue (with nobody
and with 200 others waiting, under quotas and during a course), and a whole bid as the daemon answers it: request read,
limits checked, queue, accounts, grant saved, the claim's transaction built and its outcome read. Only etcd and the
replica's socket are left out: the transaction is answered at once from memory.

    python benchmarks/ledger.py [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import pstats
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from measure import ROOT, Table, percentile

from gpu_daemon import requests
from gpu_daemon.accounting import Accounting
from gpu_daemon.bidding import Bidding
from gpu_daemon.blobdesk import BlobDesk
from gpu_daemon.directory_store import DirectoryStore
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.ledger import Ledger, Request
from gpu_daemon.order import Policy
from gpu_daemon.publishing import Publisher
from gpu_daemon.queue import Admit, Arrive, Ended, FairQueue
from gpu_daemon.replica import LocalReplica
from gpu_daemon.reservations import read_reservations
from gpu_daemon.rundir import RunDir
from gpu_daemon.shares import read_shares
from gpu_daemon.simulated import simulated
from gpu_daemon.site import Settings, Site
from nbos_cluster import keys, membership, records
from nbos_cluster.etcd import Etcd, Lease
from nbos_cluster.kv import KV, Snapshot, TxnResult
from nbos_cluster.records import Epoch, GrantRecord, KernelSpec, LogEntry, Ports, Resources

assert ROOT  # measure puts this tree on the path

DEVICES, TPCS, GRANTS, WAITING = 64, 66, 500, 200
ROUNDS = 3000
DECISION_BAR, BID_BAR = 50.0, 1000.0
"""Microseconds."""

SHARES = read_shares(
    {"users": {f"u{n}": {"tpcs": 10, "weight": 1 + n % 3} for n in range(40)}, "groups": {"g": {"devices": 2}}}
)
COURSE = read_reservations(
    [
        {
            "name": "ml101",
            "groups": ["ml101"],
            "seats": 30,
            "tpcs": 20,
            "days": ["thu"],
            "from": "00:00",
            "to": "23:59",
            "timezone": "UTC",
        }
    ]
)
CASES = {"": Policy(), "quotas": Policy(SHARES), "a course is on": Policy(SHARES, COURSE)}


@dataclass
class Costs:
    """CPU microseconds by what was done."""

    found: dict[str, list[float]] = field(default_factory=dict)

    def time(self, what: str, step: Callable[..., Any], *arguments: Any) -> Any:
        began = time.thread_time_ns()
        result = step(*arguments)
        self.found.setdefault(what, []).append((time.thread_time_ns() - began) / 1e3)
        return result


def request(name: str, chance: random.Random, tpcs: int) -> Request:
    owner = f"u{chance.randrange(80)}"
    return Request(name, owner, f"k-{owner}", 0, 1, Resources(tpcs=tpcs), ("g",))


def crowded(policy: Policy, chance: random.Random) -> FairQueue:
    """500 grants of 1 to 8 TPCs, in the holes that 1,500 others left."""
    queue = FairQueue(Ledger("h", simulated("h", DEVICES, "H200", TPCS, 141 << 30)), policy)
    names = []
    for n in range(2000):
        out = queue.handle(Arrive(request(f"g{n}", chance, chance.randint(1, 8)), 0.0, wait=False))
        names += [step.grant.grant for step in out if isinstance(step, Admit)]
        while len(names) > GRANTS:
            queue.handle(Ended(names.pop(chance.randrange(len(names))), 1.0, used=False))
    return queue


def ledger_costs(costs: Costs) -> None:
    chance = random.Random(1)
    ledger = crowded(Policy(), chance).ledger
    for n in range(ROUNDS):
        one = request(f"x{n}", chance, chance.randint(1, 8))
        costs.time("ledger: fit", ledger.fit, one.resources)
        given = costs.time("ledger: reserve", ledger.reserve, one)
        assert isinstance(given, GrantRecord)
        costs.time("ledger: release", ledger.release, one.grant)


def queue_costs(costs: Costs) -> None:
    for case, policy in CASES.items():
        chance = random.Random(2)
        queue = crowded(policy, chance)
        label = f", {case}" if case else ""
        for waiting in (0, WAITING):
            crowd = f", {waiting} wait" if waiting else ""
            for n in range(waiting):
                queue.handle(Arrive(request(f"w{n}", chance, TPCS - n % 4), 2.0))
            for n in range(ROUNDS if not waiting else ROUNDS // 10):
                one, now = request(f"x{waiting}-{n}", chance, chance.randint(1, 2)), 3.0 + n / 1000
                event = Arrive(one, now, wait=False)
                out = costs.time(f"queue: a grant{crowd}{label}", queue.handle, event)
                if out and isinstance(out[0], Admit):
                    ended = Ended(one.grant, now)
                    costs.time(f"queue: given back{crowd}{label}", queue.handle, ended)
        for n in range(20):
            costs.time(f"queue: telling all, {WAITING} wait{label}", queue.tell_all, 4.0 + n)


# -- a whole bid -------------------------------------------------------------------------------------------------------


class Memory(Etcd):
    """An etcd that takes every transaction at once."""

    def __init__(self) -> None:
        super().__init__(["127.0.0.1:1"])
        self.revision = 100

    async def txn(self, compare: Any, success: Any, failure: Any = ()) -> TxnResult:
        self.revision += 1
        return TxnResult(True, self.revision, [()] * len(success))


def site_of(folder: Path, queue: FairQueue) -> Site:
    settings = Settings(host="h", run_dir=folder)
    desk = BlobDesk(DirectoryStore(folder / "blobs"), 3600.0, 45.0)
    rundir = RunDir(folder)
    rundir.open()
    site = Site(settings, Memory(), queue.ledger, queue, desk, rundir)
    site.lease = cast(Lease, type("Held", (), {"id": 7, "sure": True})())
    spec = KernelSpec(
        kernel="k",
        owner="u1",
        replicas=1,
        placement={"0": "h"},
        key="k",
        curve_publickey="p" * 40,
        curve_secretkey="s" * 40,
        max_resources=Resources(gpus=8, tpcs=TPCS),
        groups=("g",),
    )
    values = {
        keys.spec("k"): spec,
        keys.epoch("k"): Epoch(epoch=1, incarnation=1),
        keys.log_entry("k", 0): LogEntry(n=0, kind="origin"),
    }
    kvs = [KV(key, records.encode(value), 5, 5) for key, value in sorted(values.items())]
    site.views.apply(Snapshot(kvs, 5))
    assert membership.create(spec)
    return site


async def bid_costs(costs: Costs, profile: cProfile.Profile | None) -> None:
    chance = random.Random(3)
    for waiting in (0, WAITING):
        queue = crowded(Policy(SHARES), chance)
        with tempfile.TemporaryDirectory() as folder:
            site = site_of(Path(folder), queue)
            accounting = Accounting(site, 100)
            await accounting.open()
            accounting.resume()
            bidding = Bidding(site, Publisher(site), accounting)
            replica = LocalReplica(
                ReplicaId("k", 0),
                site.rundir.make_folder(ReplicaId("k", 0)),
                "127.0.0.1",
                Ports(shell=1, iopub=2, stdin=3, control=4, hb=5),
            )
            for n in range(waiting):
                queue.handle(Arrive(request(f"w{n}", chance, TPCS - n % 4), site.now()))
            name = f"a bid with a grant{f', {waiting} wait' if waiting else ''}"
            message = {"n": 1, "attempt": 1, "kind": "cell", "resources": {"tpcs": 2}, "wait": True, "applied": 0}
            for n in range(ROUNDS // 3):
                if profile is not None and n > 50:
                    profile.enable()
                began = time.thread_time_ns()
                answer = await bidding.bid(replica, requests.bid(message))
                took = (time.thread_time_ns() - began) / 1e3
                if profile is not None:
                    profile.disable()
                assert answer["answer"] == "lead", answer
                if n > 50:  # warm
                    costs.found.setdefault(name, []).append(took)
                held, replica.held = replica.held, None
                assert held is not None
                assert held.grant is not None
                site.rundir.save_grant(replica.id, None)
                bidding.grant_ended(held.grant.grant)
            await site.cancel_tasks()
            await accounting.close()
            site.rundir.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="where a bid's time goes (cProfile)")
    options = parser.parse_args()
    profile = cProfile.Profile() if options.profile else None
    costs = Costs()
    gc.freeze()
    ledger_costs(costs)
    queue_costs(costs)
    asyncio.run(bid_costs(costs, profile))
    table = Table(
        f"{DEVICES} devices of {TPCS} TPCs, {GRANTS} grants open; CPU microseconds",
        ("what", "p50", "p99", "bar", ""),
    )
    for what, found in costs.found.items():
        bar = DECISION_BAR if what.startswith("ledger") else BID_BAR if what.startswith("a bid") else 0.0
        p99 = percentile(found, 99)
        verdict = ("met" if p99 <= bar else "MISSED") if bar else ""
        table.add(what, f"{percentile(found, 50):.1f}", f"{p99:.1f}", f"{bar:.0f}" if bar else "", verdict)
    print(table.render())
    if profile is not None:
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
