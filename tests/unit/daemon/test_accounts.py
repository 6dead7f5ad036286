"""Accounts: every granted second once, in its hour, to its user, groups and kernel; kept through any kill."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_daemon.accounts import HOUR, Accounts
from gpu_daemon.journal import Change, Journal
from gpu_daemon.rundir import RunDirError
from gpu_daemon.simulated import simulated
from gpu_daemon.timeofday import TimeOfDay
from nbos_cluster.records import DeviceShare, GrantRecord, UseLine

DEVICES = simulated("h", 2, "H200", tpcs=8, memory=800)
ROOT = Path(__file__).parents[3]


def grant(name: str, owner: str = "ann", tpcs: int = 8, device: int = 0, groups: tuple[str, ...] = ()) -> GrantRecord:
    one = DEVICES[device]
    share = DeviceShare(
        uuid=one.uuid,
        index=device,
        model=one.model,
        tpcs=tuple(range(tpcs)),
        memory=tpcs * 100,
        whole=tpcs == 8,
        kind="simulated",
    )
    return GrantRecord(
        grant=name, host="h", owner=owner, kernel="k-" + owner, replica=0, n=1, shares=(share,), groups=groups
    )


def test_a_grant_is_accounted_in_all_its_dimensions() -> None:
    accounts = Accounts(DEVICES)
    accounts.begin(grant("a", tpcs=2, groups=("b", "a", "a")), 100.0)
    (line,) = accounts.end("a", 110.0)
    assert line == UseLine(
        hour=0,
        owner="ann",
        groups=("a", "b"),
        kernel="k-ann",
        cells=1,
        seconds=10.0,
        device_seconds=2.5,
        tpc_seconds=20.0,
        byte_seconds=2000.0,
    )
    assert accounts.end("a", 120.0) == [], "twice is no mistake, and counts once"


def test_a_grant_whose_tpcs_change_is_accounted_with_those_that_it_had_then() -> None:
    accounts = Accounts(DEVICES)
    accounts.begin(grant("a", tpcs=6), 0.0)
    accounts.begin(grant("b", tpcs=2, owner="bob"), 0.0)
    lines = accounts.settle(5.0) + accounts.change(grant("a", tpcs=2), 10.0)
    assert accounts.change(grant("gone"), 10.0) == []
    lines += accounts.settle(12.0) + accounts.change(grant("a", tpcs=4), 20.0) + accounts.end("a", 30.0)
    mine = [line for line in lines if line.owner == "ann"]
    assert sum(line.tpc_seconds for line in mine) == 6 * 10 + 2 * 10 + 4 * 10
    assert (sum(line.seconds for line in mine), sum(line.cells for line in mine)) == (30.0, 1)
    assert len(accounts) == 1


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_a_clock_that_is_set_makes_nobodys_use_longer_or_shorter(step: float) -> None:
    accounts, wall, steady = Accounts(DEVICES), 10_000.0, 5.0
    clock = TimeOfDay(lambda: wall, lambda: steady)
    accounts.begin(grant("a"), clock.look()[0])
    wall, steady = wall + 10, steady + 10
    lines = accounts.settle(clock.look()[0])
    wall, steady = wall + 20 + step, steady + 20
    now, found = clock.look()
    assert found == step
    accounts.clock_set(found)
    lines += accounts.end("a", now)
    assert sum(line.seconds for line in lines) == 30.0
    assert lines[-1].hour == int(now // HOUR), "what came after is told by the new time"
    wall, steady = wall + 3600, steady + 3600.4
    assert clock.look()[1] == 0.0, "slewing is no step"


def test_a_grant_over_several_hours_is_dealt_out_to_each() -> None:
    accounts = Accounts(DEVICES)
    accounts.begin(grant("a"), 3000.0)
    lines = accounts.end("a", 3 * HOUR + 100.0)
    assert [(line.hour, line.seconds, line.cells) for line in lines] == [
        (0, 600.0, 0),
        (1, 3600.0, 0),
        (2, 3600.0, 0),
        (3, 100.0, 1),
    ]


def test_a_clock_that_is_set_back_accounts_nothing_twice() -> None:
    accounts = Accounts(DEVICES)
    accounts.begin(grant("a"), 100.0)
    assert sum(line.seconds for line in accounts.settle(150.0)) == 50
    assert accounts.settle(120.0) == []
    assert sum(line.seconds for line in accounts.end("a", 160.0)) == 10


def test_a_claim_that_was_lost_held_the_device_but_was_no_cell() -> None:
    accounts = Accounts(DEVICES)
    accounts.begin(grant("a"), 0.0)
    assert [(line.cells, line.seconds) for line in accounts.end("a", 1.0, used=False)] == [(0, 1.0)]


def test_energy_is_shared_by_the_tpcs_that_are_granted() -> None:
    accounts = Accounts(DEVICES)
    accounts.begin(grant("a", "ann", tpcs=6), 0.0)
    accounts.begin(grant("b", "bob", tpcs=2), 0.0)
    assert sum(line.joules for line in accounts.settle(5.0)) == 0, "nothing was told yet"
    accounts.power({DEVICES[0].uuid: 80.0, DEVICES[1].uuid: 500.0})
    assert {line.owner: line.joules for line in accounts.settle(15.0)} == {"ann": 600.0, "bob": 200.0}
    accounts.end("b", 15.0)
    assert [line.joules for line in accounts.end("a", 25.0)] == [800.0], "alone on the device"


def test_the_lines_add_up_to_what_was_held_however_they_are_cut() -> None:
    chance = random.Random(1)
    accounts, now, held, lines = Accounts(DEVICES), 1e9, 0.0, []
    open_since: dict[str, float] = {}
    for number in range(3000):
        now += chance.expovariate(1 / 100)
        if chance.random() < 0.5:
            accounts.begin(grant(f"g{number}", chance.choice("abc"), chance.randint(1, 8)), now)
            open_since[f"g{number}"] = now
        elif open_since and chance.random() < 0.7:
            name = chance.choice(sorted(open_since))
            held += now - open_since.pop(name)
            lines += accounts.end(name, now)
        else:
            lines += accounts.settle(now)
    lines += accounts.settle(now)
    held += sum(now - since for since in open_since.values())
    assert sum(line.seconds for line in lines) == pytest.approx(held, abs=1e-3)
    assert all(line.seconds >= 0 for line in lines)


# -- the journal -------------------------------------------------------------------------------------------------------


def line(hour: int, owner: str, seconds: float) -> UseLine:
    return UseLine(hour=hour, owner=owner, kernel="k", groups=("g",), cells=1, seconds=seconds)


async def test_lines_of_one_key_are_added_up_and_found_by_the_hour(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "accounts.db")
    known = journal.open()
    for _ in range(3):
        journal.write([Change([line(7, "ann", 1.5), line(8, "ann", 2.0)], settled=9.0)])
    assert await journal.lines(7, 8) == [UseLine(hour=7, owner="ann", kernel="k", groups=("g",), cells=3, seconds=4.5)]
    await journal.published(7)
    await journal.close(5)
    again = Journal(tmp_path / "accounts.db")
    found = again.open()
    assert (found.journal, found.unpublished) == (known.journal, (8,))
    await again.close(5)


async def test_open_grants_are_found_again_with_the_last_moment_known(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "accounts.db")
    journal.open()
    for name, at in (("a", 10.0), ("b", 30.0), ("c", 31.0)):
        journal.write([Change(begun=grant(name), at=at)])
    journal.write([Change([line(0, "ann", 5.0)], settled=25.0)])
    journal.write([Change(ended="c")])
    await journal.close(5)
    again = Journal(tmp_path / "accounts.db")
    assert {record.grant: at for record, at in again.open().open} == {"a": 25.0, "b": 30.0}
    await again.close(5)


async def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "accounts.db").write_bytes(b"x" * 5000)
    journal = Journal(tmp_path / "accounts.db")
    journal.open()
    journal.write([Change([line(1, "ann", 1.0)])])
    assert len(await journal.lines(0, 2)) == 1
    await journal.close(5)
    assert "set aside" in caplog.text
    (aside,) = (name for name in os.listdir(tmp_path) if "broken" in name)
    assert (tmp_path / aside).stat().st_size == 5000


WRITER = """
import sys
from pathlib import Path
from gpu_daemon.journal import Change, Journal
from nbos_cluster.records import UseLine
journal = Journal(Path(sys.argv[1]))
journal.open()
import asyncio, itertools
async def work():
    for n in itertools.count(1):
        line = UseLine(hour=1, owner="ann", kernel="k", seconds=1.0)
        journal.write([Change([line], settled=float(n))])
        await journal.lines(1, 2)
        print(n, flush=True)
asyncio.run(work())
"""


def read_all(path: Path) -> UseLine:
    async def read() -> UseLine:
        journal = Journal(path)
        journal.open()
        (found,) = await journal.lines(0, 9)
        await journal.close(5)
        return found

    return asyncio.run(read())


def test_what_was_written_survives_a_kill_and_lines_agree_with_the_time_they_reach(tmp_path: Path) -> None:
    path = tmp_path / "accounts.db"
    total = 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(path)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert writer.stdout is not None
        said = 0
        while said < 20:
            said = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
        rest = writer.stdout.read().split()
        said = int(rest[-1]) if rest else said
        writer.stdout.close()
        seconds = read_all(path).seconds
        assert total + said <= seconds <= total + said + 1
        total = int(seconds)


def test_a_disk_that_does_not_let_the_accounts_be_opened_sets_none_aside(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="cannot be opened"):
        Journal(tmp_path / "missing" / "accounts.db").open()
