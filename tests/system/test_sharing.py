"""Users share GPUs on a whole cluster: who goes first and what the others read, and accounts that add up."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.cluster import Cluster, Notebook
from tests.system.hubclient import eventually
from tests.system.nbosenv import environment

pytestmark = pytest.mark.timeout(240)

SHARING = {"shares": {"users": {"vip": {"devices": 1}}}}
HELD = "%%gpu 1\nprint('begun', flush=True)\nimport time; began = time.time(); time.sleep({seconds})\nprint(began)"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One simulated device on each of three hosts; the user `vip` is guaranteed one everywhere."""
    folder = tmp_path_factory.mktemp("sharing")
    (folder / "sharing.json").write_text(json.dumps(SHARING))
    cluster = Cluster(folder / "state", "--gpus", "1", "--sharing", str(folder / "sharing.json"))
    cluster.start()
    yield cluster
    assert cluster.stop() == []


def nbos_accounts(cluster: Cluster, *arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, "-m", "nbos.cli", "accounts", "--state-dir", str(cluster.state_dir), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout)))


async def test_a_guaranteed_cell_goes_first_others_read_why_and_the_accounts_add_up(cluster: Cluster) -> None:
    await cluster.hub.api("POST", "groups/vision")
    await cluster.hub.add_user("ann")
    await cluster.hub.api("POST", "groups/vision/users", {"users": ["ann"]})
    # All on three hosts with three replicas each: three of ann's cells hold all there is.
    ann = [await Notebook.open(cluster, "ann") for _ in range(3)]
    bob, vip = await Notebook.open(cluster, "bob"), await Notebook.open(cluster, "vip")
    for notebook in (*ann, bob, vip):
        await notebook.run("1")
        await notebook.settled()
    began = time.time()
    holders = [await one.channels.submit(HELD.format(seconds=8 + 2 * at)) for at, one in enumerate(ann)]
    for cell in holders:
        await cell.text("begun")
    later = await bob.channels.submit(HELD.format(seconds=2))
    await later.text("position", 10)
    first = await vip.channels.submit(HELD.format(seconds=2))
    await later.text("cells within a guaranteed quota go first", 10)
    status = await asyncio.to_thread(cluster.status)
    os.kill(cluster.daemon_pid(status["hosts"][0]["name"]), signal.SIGKILL)  # somebody's cell runs there
    results = [await cell.result(60) for cell in (*holders, first, later)]
    assert [result.status for result in results] == ["ok"] * 5
    at = {who: float(results[n].stdout.split()[-1]) for n, who in ((3, "vip"), (4, "bob"))}
    assert at["vip"] < at["bob"]
    took = time.time() - began

    async def all_accounted() -> list[dict[str, str]] | None:
        rows = await asyncio.to_thread(nbos_accounts, cluster)
        return rows if sum(int(row["cells"]) for row in rows) == 5 else None

    rows = {row["user"]: row for row in await eventually(all_accounted, "five cells are accounted", 20)}
    held = {user: float(row["seconds"]) for user, row in rows.items()}
    # What they slept, and little more: asking, binding, and giving back.
    for user, slept in (("ann", 30.0), ("bob", 2.0), ("vip", 2.0)):
        assert slept <= held[user] <= slept + 3.0, held
        assert abs(float(rows[user]["device_seconds"]) - held[user]) < 0.01
        assert abs(float(rows[user]["tpc_seconds"]) - held[user] * 66) < 0.2
    assert sum(held.values()) <= 3 * took

    by_kernel = await asyncio.to_thread(nbos_accounts, cluster, "--by", "kernel")
    assert abs(sum(float(row["seconds"]) for row in by_kernel) - sum(held.values())) < 0.01
    assert {row["kernel"] for row in by_kernel} == {n.kernel for n in (*ann, bob, vip)}
    by_group = {
        row["group"]: float(row["seconds"]) for row in await asyncio.to_thread(nbos_accounts, cluster, "--by", "group")
    }
    assert by_group == {"vision": held["ann"], "": pytest.approx(held["bob"] + held["vip"], abs=0.01)}

    assert {row["user"] for row in (await own(cluster, "bob"))["rows"]} == {"bob"}
    assert (await own(cluster, "eve"))["rows"] == []
    for notebook in (*ann, bob, vip):
        await notebook.close()


async def own(cluster: Cluster, user: str) -> Any:
    await cluster.hub.add_user(user)
    hub = cluster.hub.as_user(await cluster.hub.user_token(user))
    return await hub.service("GET", "nbos/api/accounts")


def test_a_wrong_table_ends_nbos_up_with_the_entry(cluster: Cluster) -> None:
    wrong = cluster.state_dir.parent / "wrong.json"
    wrong.write_text(json.dumps({"reservations": [{"name": "ml101", "groups": ["g"], "from": "10"}]}))
    command = [sys.executable, "-m", "nbos.cli", "up", "--sharing", str(wrong)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 2
    assert "reservation ml101: from must be a time of day such as '10:00', not '10'" in done.stderr
