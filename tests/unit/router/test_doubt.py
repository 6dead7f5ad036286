"""A replica whose record has gone is doubted, and believed while its connection stands: etcd may have stood still."""

from __future__ import annotations

import pytest

from nbos_provisioner.fleet import DOUBT, Fleet
from nbos_provisioner.instructions import Disconnect, Member

from .world import World

PORTS = {"shell": 1}


def listed(state: str, pid: int = 7) -> tuple[Member, ...]:
    gone = state in ("lost", "missing")
    return (Member(0, "a", state, "" if gone else "10.0.0.1", {} if gone else PORTS, pid=0 if gone else pid),)


def connected() -> Fleet:
    fleet = Fleet()
    fleet.update(1, listed("ready"), 1, 0.0)
    fleet.up.add(0)
    return fleet


@pytest.mark.parametrize("state", ["lost", "missing"])
def test_it_is_kept_until_its_record_is_back(state: str) -> None:
    fleet = connected()
    assert fleet.update(1, listed(state), 2, 10.0) == ([], [])
    assert fleet.believed() == 10.0 + DOUBT
    assert fleet.update(1, listed(state), 3, 12.0) == ([], [])
    assert fleet.believed() == 10.0 + DOUBT, "what is said again does not prolong it"
    assert fleet.update(1, listed("ready"), 4, 13.0) == ([], [])
    assert fleet.believed() is None
    assert fleet.up == {0}


def test_it_is_given_up_when_the_record_stays_away() -> None:
    fleet = connected()
    fleet.update(1, listed("lost"), 2, 10.0)
    todo, lost = fleet.update(1, listed("lost"), 2, 10.0 + DOUBT)
    assert (todo, lost) == ([Disconnect(0)], [(0, "it is lost")])


def test_another_process_in_its_place_ends_the_doubt() -> None:
    fleet = connected()
    fleet.update(1, listed("lost"), 2, 10.0)
    _, lost = fleet.update(1, listed("ready", pid=8), 3, 11.0)
    assert [index for index, _ in lost] == [0]
    assert fleet.believed() is None


def test_a_change_of_membership_is_no_doubt() -> None:
    fleet = connected()
    _, lost = fleet.update(2, listed("lost"), 3, 10.0)
    assert [index for index, _ in lost] == [0]


def a_cell_that_ran_unheard() -> tuple[World, str]:
    """Replica 0 has run and committed it; the records of all have gone, and the others say that it is decided."""
    world = World()
    for index in world.replicas:
        world.link(index)
        world.work(index)
        world.hear(index, "said")
    cell = world.execute()
    world.work(0)
    world.members({0: "lost", 1: "lost"})
    world.finish(0, "ok")
    world.commit(0)
    world.tick(0.16)
    for _ in range(3):
        for index in (1, 2):
            world.work(index)
            world.hear(index, "said")
        world.tick(0.2)
    return world, cell


def test_no_reply_is_lost_when_nobody_died() -> None:
    world, cell = a_cell_that_ran_unheard()
    world.settle()
    assert world.replies == [(cell, "ok")]
    assert world.runs[cell] == 1


def test_one_that_ends_while_it_is_doubted_is_lost_at_once() -> None:
    world, cell = a_cell_that_ran_unheard()
    world.kill(0, "free")
    assert 0 not in world.core.doubted
    world.settle()
    assert world.runs[cell] == 1
    assert [reply for reply, _ in world.replies] == [cell]


def test_one_that_is_never_heard_of_again_does_not_hold_the_cell_up_for_ever() -> None:
    world, cell = a_cell_that_ran_unheard()
    world.replicas[0].said.clear()
    world.tick(DOUBT)
    world.settle()
    assert [reply for reply, _ in world.replies] == [cell]
    assert world.runs[cell] == 1
