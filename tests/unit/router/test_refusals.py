"""A cell that no connected replica can ever run: refused only when no member that may come can run it either."""

from __future__ import annotations

from nbos_provisioner.election import ABSENCE

from .world import World


def a_world_whose_gpus_are_on_host_0(state: str) -> World:
    """Replica 0 was killed: the daemons say in which state it is."""
    world = World()
    for index in (0, 1, 2):
        world.link(index)
    world.refusing = {1, 2}
    world.kill(0, "free")
    world.members({0: state})
    return world


def go_on(world: World, rounds: int = 20) -> None:
    for _ in range(rounds):
        for index in world.replicas:
            world.work(index)
            while world.replicas[index].said or world.replicas[index].shown:
                world.hear(index, "said")
                world.hear(index, "shown")
        world.tick(0.1)


def test_a_cell_waits_for_the_replica_that_is_starting_and_runs_there() -> None:
    world = a_world_whose_gpus_are_on_host_0("starting")
    cell = world.execute()
    go_on(world)
    assert world.replies == []
    assert any("replica 0 on host host-0 is starting" in text for text in world.shown)
    world.members({})
    world.link(0)
    go_on(world)
    world.finish(0, "ok")
    go_on(world)
    assert world.replies == [(cell, "ok")]


def test_the_reason_is_shown_once() -> None:
    world = a_world_whose_gpus_are_on_host_0("starting")
    world.execute()
    go_on(world, 300)
    assert len(world.shown) == len(set(world.shown)) == 1


def test_a_failed_replica_is_not_waited_for() -> None:
    world = a_world_whose_gpus_are_on_host_0("failed")
    cell = world.execute()
    go_on(world)
    assert world.replies == [(cell, "error")]
    assert world.refusals == {(cell, 1), (cell, 2)}


def test_a_lost_host_is_waited_for_a_while() -> None:
    world = a_world_whose_gpus_are_on_host_0("lost")
    cell = world.execute()
    go_on(world)
    assert world.replies == []
    world.tick(ABSENCE)
    assert world.replies == [(cell, "error")]


def test_all_members_that_refuse_refuse_the_cell_at_once() -> None:
    world = a_world_whose_gpus_are_on_host_0("ready")
    world.refusing = {0, 1, 2}
    world.link(0)
    cell = world.execute()
    go_on(world, 5)
    assert world.replies == [(cell, "error")]
