"""Faults in random order under the load of several notebooks; afterwards every notebook's history is checked.

The seed is printed and taken from $NBOS_TEST_SEED, the number of faults from $NBOS_TEST_FAULTS.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter

import pytest

from tests.cluster.faults import done, plan
from tests.cluster.history import History
from tests.cluster.machines import Machines
from tests.system.cluster import Notebook, after
from tests.system.hubclient import eventually

FAULTS = int(os.environ.get("NBOS_TEST_FAULTS", "25"))
NOTEBOOKS = 3

pytestmark = pytest.mark.timeout(120 + 40 * FAULTS)


KEPT = "kept = len(ran); big = kept.to_bytes(4, 'big') * 10_000"
"""A value that goes through the blob store, beside a small one that tells which it must be."""


async def load(history: History, seed: int, stop: asyncio.Event) -> float:
    """Cells, one after the other, until told to stop; the longest time that one took."""
    chance, longest = random.Random(seed), 0.0
    while not stop.is_set():
        before = chance.choice(["", KEPT, f"time.sleep({chance.random():.2f})", "%%gpu tpcs=8"])
        result = await history.run(before, chance.choice(["", "", "time.sleep(0.5)", "1/0"]), timeout=120)
        longest = max(longest, result.seconds)
        await after(chance.random() / 2)
    return longest


async def test_faults_in_random_order(machines: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("NBOS_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)

    def say(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    say(f"\nNBOS_TEST_SEED={seed} NBOS_TEST_FAULTS={FAULTS}")
    histories = [await History(await Notebook.open(machines, "ada")).begin() for _ in range(NOTEBOOKS)]
    for history in histories:
        await history.run(KEPT)
    stop, began = asyncio.Event(), time.monotonic()
    loads = [asyncio.create_task(load(history, seed + n, stop)) for n, history in enumerate(histories)]
    for number, fault in enumerate(plan(seed, FAULTS)):
        say(f"{time.monotonic() - began:6.1f} s  {number}: {fault}")
        async with done(fault, machines):
            pass
        await machines.whole(90)
        for history in histories:
            await history.look(machines.etcd, machines.admin())
        await eventually(lambda: _no_load_ended(loads), "the load goes on", 1)
    stop.set()
    longest = await asyncio.gather(*loads)
    ours = Counter(str(s.result.reply.get("ename")) for h in histories for s in h.sent if s.result is not None)
    told = ", ".join(f"{count} {name}" for name, count in ours.items() if name.startswith("NBOS"))
    cells = sum(len(history.sent) for history in histories)
    say(f"{cells} cells, the longest {max(longest):.1f} s, of our errors: {told or 'none'}")
    for history in histories:
        await history.check(machines.etcd, machines.admin())
        if gone := await gone_by_name(history):
            say(gone)
        await history.notebook.settled(90)
        await history.notebook.close()


async def gone_by_name(history: History) -> str:
    """The large value is the latest one ('' then), or gone by name, in words: an older one never passes for it."""
    result = await history.notebook.channels.execute("big == kept.to_bytes(4, 'big') * 10_000", 60)
    if result.value == "True":
        return ""
    assert result.error.startswith("NotReplicatedError"), f"{history.notebook.kernel}: {result.value} {result.error}"
    return f"kernel {history.notebook.kernel}: {result.error}"


async def _no_load_ended(loads: list[asyncio.Task[float]]) -> bool:
    for one in loads:
        if one.done():
            one.result()
    return True
