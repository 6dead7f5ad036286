"""Random programs on a real cluster whose replicas are killed with `kill -9`: after every failover the namespace is
what a plain Python run of the same cells gives, deeply: values, types, and what is the same object.

A replica is killed between cells, right behind a reply (whose cell is then there wholly or not at all: `ran` in the
namespace tells), and in the middle of a cell (which then ends with an error and changed nothing). What cannot be
replicated is named as lost, and is then gone in the plain run too.

One `nbos up` serves all examples; the kernel is restarted between two. The programs are the same in every run, without
a database: a red test means that something changed. `NBOS_RANDOM_EXAMPLES=200` makes another, longer run each time.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from tests.fidelity import programs
from tests.system.cluster import Cluster, Notebook
from tests.system.hubclient import eventually
from tests.system.nbosenv import ROOT

EXAMPLES = int(os.environ.get("NBOS_RANDOM_EXAMPLES", "0"))
SIDE = ROOT / "tests" / "fidelity" / "described.py"
TELL = f"__import__('runpy').run_path({str(SIDE)!r})['tell'](globals(), {programs.NAMES!r})"
LOOK = f"print(__import__('base64').b64encode(__import__('zlib').compress({TELL}.encode())).decode())"
"""Compressed: of what large values look like, Jupyter Server's limit on the rate of outputs would pass on nothing."""

pytestmark = pytest.mark.timeout(240 if not EXAMPLES else 0)

BETWEEN, BEHIND, WITHIN, STANDBY = "between cells", "behind a reply", "within a cell", "a standby"

steps = st.one_of(
    programs.cells(programs.NUMPY),
    programs.cells(programs.NUMPY),
    programs.cells(programs.NUMPY),
    programs.cells(programs.NUMPY),
    st.sampled_from([BETWEEN, BEHIND, WITHIN, STANDBY]),
)


class World:
    """The cluster, and the kernel that all examples use."""

    def __init__(self, cluster: Cluster) -> None:
        self.loop = asyncio.new_event_loop()
        self.cluster = cluster
        self.notebook: Notebook | None = None

    def run(self, program: list[str]) -> None:
        self.loop.run_until_complete(self._run(program))

    def close(self) -> None:
        if self.notebook is not None:
            self.loop.run_until_complete(self.notebook.close())
        self.loop.close()

    async def _run(self, program: list[str]) -> None:
        if self.notebook is None:
            self.notebook = await Notebook.open(self.cluster, "ada")
        else:
            await self.notebook.server.restart(self.notebook.kernel)
        await Example(self.notebook).run([*program, BETWEEN])


class Example:
    def __init__(self, notebook: Notebook) -> None:
        self.notebook = notebook
        self.story: list[dict[str, Any]] = []
        """What the plain run does: {"n", "code"}, or {"gone": names}."""
        self.count = 0
        self.unsure: set[int] = set()

    async def run(self, program: list[str]) -> None:
        await self.notebook.run("ran = []")
        for step in program:
            note(step)
            if step == STANDBY:
                await self._kill("standby")
            elif step in (BETWEEN, BEHIND, WITHIN):
                await self._fail_over(step)
            else:
                await self._cell(step)

    async def _cell(self, code: str) -> None:
        self.count += 1
        self.story.append({"n": self.count, "code": code})
        await self.notebook.channels.execute(f"ran.append({self.count})\n{code}", 60)

    async def _fail_over(self, when: str) -> None:
        if when == WITHIN:
            await self._within()
        elif when == BEHIND:
            await self._cell("a = [1, 2, 3]; b = a; c = bytearray(300_000); c[7] = 1")
            self.unsure.add(self.count)
            await self._kill("executor")
        else:
            await self.notebook.settled(60)
            await self._kill("executor")
        await self._compare()

    async def _within(self) -> None:
        await self.notebook.settled(60)
        self.count += 1
        code = f"ran.append({self.count}); a = [9]; print('begun', flush=True); __import__('time').sleep(60)"
        cell = await self.notebook.channels.submit(code)
        await cell.text("begun")
        await self._kill("executor")
        result = await cell.result(30)
        assert result.error.startswith("NBOSReplicaDied"), result.error

    async def _kill(self, role: str) -> None:
        async def there() -> int | None:
            """Its pid; one that is not there yet has 0, and to kill that would be to kill this test and its parents."""
            members = (await self.notebook.model())["members"]
            return next((replica["pid"] for replica in members if replica["role"] == role and replica["pid"]), None)

        pid = await eventually(there, f"there is a process that is the {role}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    async def _compare(self) -> None:
        result = await self.notebook.channels.execute(LOOK, 60)
        assert result.status == "ok", result.error
        got = json.loads(zlib.decompress(base64.b64decode(result.stdout)))
        ran = json.loads(await self.notebook.run("ran"))
        assert {step["n"] for step in self.story if "n" in step} - set(ran) <= self.unsure, ran
        self.story = [step for step in self.story if "gone" in step or step["n"] in ran]
        self.unsure.clear()
        lost = (await self.notebook.model())["lost"]
        self.story.append({"gone": [name for name in lost if name in programs.NAMES and name not in got["names"]]})
        wanted = plain(self.story)
        assert got["names"] == wanted["names"], (lost, self.story)
        for name in wanted["names"]:
            assert got["said"][name] == wanted["said"][name], (name, lost, self.story)


def plain(story: list[dict[str, Any]]) -> Any:
    """The same in a plain Python process."""
    done = subprocess.run(
        [sys.executable, str(SIDE)], input=json.dumps(story), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    cluster = Cluster(tmp_path_factory.mktemp("random-programs") / "state")
    cluster.start()
    world = World(cluster)
    yield world
    world.close()
    assert cluster.stop() == []


@settings(
    max_examples=EXAMPLES or 5,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    # Shrinking would kill hundreds of replicas more; the notes name the cells, and the machine over doubles shrinks.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(program=st.lists(steps, min_size=10, max_size=24))
def test_a_killed_kernel_is_what_a_plain_run_is(world: World, program: list[str]) -> None:
    world.run(program)
