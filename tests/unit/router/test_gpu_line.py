"""A cell that waited long for a GPU has one line under it: for how long, what it got, what it used."""

from __future__ import annotations

from typing import Any

import pytest

from nbos_provisioner import granted

from .test_waits import listen, texts
from .world import GRANT, USED, World

GOT = "got 2 TPCs and 1.0 GiB of Simulated GPU on replica 0 on host host-0"


def waited(world: World, seconds: float, *, silent: bool = False) -> str:
    """A cell that waits on every host, and then runs on the first: its request."""
    for index, replica in world.replicas.items():
        world.link(index)
        replica.busy = True
        world.work(index)
        world.hear(index, "said")
    cell = world.execute(silent=silent)
    for _ in range(4):
        for index in world.replicas:
            world.work(index)
            listen(world, index)
        world.tick(0.05)
    world.now += seconds
    world.room(0)
    listen(world)
    return cell


def test_the_display_of_the_wait_ends_with_what_the_cell_got_and_used() -> None:
    world = World()
    world.grant, world.used = GRANT, USED
    cell = waited(world, 7.0)
    assert any("no room (position 1" in text for text in texts(world, cell))
    assert GOT in texts(world, cell)[-1]
    world.finish(0, "ok")
    listen(world)
    line = texts(world, cell)[-1]
    assert line.startswith("NBOS: waited 7.")
    assert line.endswith(f"{GOT}, held it for 5.0 s, 10 TPC·s")
    world.check_displays()


@pytest.mark.parametrize(("grant", "seconds"), [(GRANT, 0.5), (None, 7.0)])
def test_a_short_wait_or_one_for_no_gpu_says_where_it_runs_and_no_more(grant: Any, seconds: float) -> None:
    world = World()
    world.grant, world.used = grant, USED
    cell = waited(world, seconds)
    world.finish(0, "ok")
    listen(world)
    assert texts(world, cell)[-1].endswith("s, runs on replica 0 on host host-0")


def test_the_threshold_is_the_sites() -> None:
    world = World(line_after=0.1)
    world.grant, world.used = GRANT, USED
    cell = waited(world, 0.5)
    world.finish(0, "error")
    listen(world)
    assert texts(world, cell)[-1].endswith("held it for 5.0 s, 10 TPC·s")


def test_a_silent_cell_says_nothing() -> None:
    world = World()
    world.grant, world.used = GRANT, USED
    cell = waited(world, 7.0, silent=True)
    world.finish(0, "ok")
    listen(world)
    assert texts(world, cell) == []


@pytest.mark.parametrize("told", [None, [], "much", {"held": "long"}, {"held": -1, "tpcs": True, "peak": 1e300}])
def test_what_the_replica_says_is_only_believed_where_it_makes_sense(told: Any) -> None:
    world = World()
    world.grant, world.used = GRANT, told
    cell = waited(world, 7.0)
    world.now += 3.0
    world.finish(0, "ok")
    listen(world)
    assert f"{GOT}, held it for " in texts(world, cell)[-1]
    assert (cell, "ok") in world.replies


def test_a_cell_lost_with_its_gpu_says_so_and_begins_anew() -> None:
    world = World()
    world.grant, world.used = GRANT, USED
    cell = waited(world, 7.0)
    world.kill(0, "free")
    world.settle()
    assert any(text.endswith(f"{GOT}, was lost with it") for text in texts(world, cell))
    world.check_displays()


def running(seconds: float, end: str) -> tuple[World, str]:
    """A cell that began without a GPU and waits for one on its way, so long, until `end`."""
    world = World()
    world.grant, world.used = None, USED
    for index in world.replicas:
        world.link(index)
        world.work(index)
        world.hear(index, "said")
    cell = world.execute()
    world.work(0)
    listen(world)
    world.grant = GRANT
    world.touch(0, "waiting")
    listen(world)
    assert "no room" in texts(world, cell)[-1]
    assert "(position 1 of 1 on host-0); interrupt the cell to leave the queue" in texts(world, cell)[-1]
    world.now += seconds
    world.touch(0, end)
    listen(world)
    return world, cell


def test_a_cell_that_waits_on_its_way_has_the_same_line() -> None:
    world, cell = running(7.0, "granted")
    assert texts(world, cell)[-1] == f"NBOS: waited 7.0 s for a GPU, {GOT}"
    world.finish(0, "ok")
    listen(world)
    assert texts(world, cell)[-1].endswith(f"{GOT}, held it for 5.0 s, 10 TPC·s")
    world.check_displays()


def test_one_that_waited_shortly_or_left_the_queue_says_so_and_no_more() -> None:
    world, cell = running(0.5, "granted")
    world.finish(0, "ok")
    listen(world)
    assert texts(world, cell)[-1] == f"NBOS: waited 0.5 s, {GOT}"
    world, cell = running(7.0, "left")
    assert texts(world, cell)[-1] == "NBOS: left the queue after 7.0 s"
    world.touch(0, "waiting")
    listen(world)
    world.finish(0, "error")
    listen(world)
    assert texts(world, cell)[-1] == "NBOS: left the queue as the cell ended"
    world.check_displays()


@pytest.mark.parametrize(
    ("grant", "text"),
    [
        ({"shares": [{"model": "H200", "whole": True}] * 2}, "2 GPUs (H200)"),
        ({"shares": [{"whole": True}]}, "1 GPU"),
        (GRANT, "2 TPCs and 1.0 GiB of Simulated GPU"),
        ({"shares": [{"tpcs": 3, "memory": "x", "model": 5}]}, "0 TPCs and 0.0 GiB of 5"),
        *[(nothing, "") for nothing in (None, {}, [], "g", {"shares": []}, {"shares": {}}, {"shares": [1]})],
    ],
)
def test_a_grant_in_a_few_words(grant: Any, text: str) -> None:
    assert granted.describe(grant) == text
