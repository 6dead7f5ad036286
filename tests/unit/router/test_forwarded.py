"""Requests without a number, and who may speak about them: the replica that was given them, until it is done."""

from __future__ import annotations

import pytest

from nbos_provisioner.election import ALIVE, BEAT, LISTEN, SILENCE, SUBSHELLS
from nbos_provisioner.instructions import Alive

from .world import SUBSHELL, World


def ready() -> World:
    """Three connected replicas, of which the first has run a cell."""
    world = World()
    for index in world.replicas:
        world.link(index)
        world.work(index)
        world.hear(index, "said")
    world.execute()
    world.settle()
    assert world.core.fleet.executor == 0
    return world


def hear_all(world: World, index: int, *order: str) -> None:
    for what in order or ("said", "shown"):
        for _ in range(10):
            world.hear(index, what)


def states(world: World, msg_id: str) -> tuple[int, int]:
    return world.counts[msg_id, "busy"], world.counts[msg_id, "idle"]


def in_subshell(world: World) -> str:
    return world.send("execute_request", {"code": "x"}, subshell=SUBSHELL)


@pytest.mark.parametrize("order", [("said", "shown"), ("shown", "said")])
def test_what_was_said_before_a_lead_passes_after_it(order: tuple[str, str]) -> None:
    """The busy of a subshell's cell leaves while the main shell's is being claimed, and the lead overtakes it."""
    world = ready()
    world.execute()
    other = in_subshell(world)
    world.work(0, other)
    world.work(0)
    assert world.replicas[0].running is not None
    hear_all(world, 0, *order)
    world.done(0)
    hear_all(world, 0)
    assert states(world, other) == (1, 1)


def test_output_of_a_thread_that_a_lead_overtakes_passes() -> None:
    world = ready()
    world.thread_prints(0, world.replicas[0].latest)
    world.execute()
    world.work(0)
    hear_all(world, 0, "said", "shown")
    assert world.threads == [0]


def test_a_busy_gets_its_idle_though_another_replica_leads_meanwhile() -> None:
    world = ready()
    other = in_subshell(world)
    world.work(0, other)
    _, cell = world.replicas[0].open[other]
    hear_all(world, 0)
    assert states(world, other) == (1, 0)
    world.execute()
    world.tick(SILENCE + 0.01)
    world.work(1)
    hear_all(world, 1)
    assert world.core.fleet.executor == 1
    world.thread_prints(0, cell)
    world.done(0)
    hear_all(world, 0)
    assert states(world, other) == (1, 1)
    assert world.threads == [0], "what it printed belongs to its cell"
    world.thread_prints(0, cell)
    hear_all(world, 0)
    assert world.threads == [0], "it is over: that replica has nothing to say any more"


def test_a_replica_with_subshells_is_waited_for_longer() -> None:
    world = ready()
    made = world.send("create_subshell_request", {}, "control")
    world.execute()
    world.tick(SILENCE + 0.01)
    assert not world.replicas[1].inbox, "it is being made there"
    world.work(0, made)
    hear_all(world, 0)
    world.tick(SILENCE + 0.01)
    assert not world.replicas[1].inbox, "it stands there"
    world.tick(SUBSHELLS)
    assert world.replicas[1].inbox, "no longer than that"


def test_nobody_is_waited_for_once_the_subshell_has_gone() -> None:
    world = ready()
    for kind, content in (("create_subshell_request", {}), ("delete_subshell_request", {"subshell_id": "a subshell"})):
        world.work(0, world.send(kind, content, "control"))
        hear_all(world, 0)
    world.execute()
    world.tick(SILENCE + 0.01)
    assert world.replicas[1].inbox


def test_a_lost_replica_takes_its_subshells_along() -> None:
    world = ready()
    world.work(0, world.send("create_subshell_request", {}, "control"))
    hear_all(world, 0)
    world.kill(0, "free")
    world.link(0)
    world.execute()
    world.tick(SILENCE + 0.01)
    assert sum(any(channel == "shell" for channel, _ in replica.inbox) for replica in world.replicas.values()) == 3


def silent() -> World:
    """A cell is asked for, and the executor says nothing."""
    world = ready()
    world.execute()
    assert world.core.watched is None
    world.tick(LISTEN + 0.01)
    assert world.core.watched == 0
    return world


def test_an_executor_that_is_silent_and_answers_no_heartbeat_is_passed_over_soon() -> None:
    world = silent()
    world.tick(SILENCE)
    assert world.replicas[1].inbox


def test_an_executor_that_is_only_busy_is_waited_for_a_while_and_the_cell_says_so() -> None:
    world = silent()
    world.event(Alive(0))
    world.tick(BEAT - 0.1)
    world.event(Alive(0))
    world.tick(0.2)
    assert not world.replicas[1].inbox
    assert "replica 0 on host host-0 is busy: it is alive" in world.shown[-1]
    world.tick(BEAT)
    world.event(Alive(0))
    world.tick(ALIVE)
    assert world.replicas[1].inbox, "not for ever"


def test_one_heartbeat_is_good_until_the_next_is_due() -> None:
    world = silent()
    world.event(Alive(0))
    world.tick(BEAT - 0.05)
    assert not world.replicas[1].inbox
    world.tick(0.1)
    assert world.replicas[1].inbox


def test_a_router_that_comes_late_itself_gives_the_executor_its_chance() -> None:
    world = ready()
    world.execute()
    world.now += 10.0
    world.tick(0.0)
    assert world.core.watched == 0
    assert not world.replicas[1].inbox


def called_back() -> tuple[World, str]:
    """The executor runs a widget's callback; a cell is asked for."""
    world = ready()
    world.replicas[0].slow = True
    world.work(0, world.send("comm_msg", {}))
    hear_all(world, 0)
    return world, world.execute()


def test_a_cell_waits_for_the_callback_before_it_and_says_so() -> None:
    world, cell = called_back()
    for _ in range(100):
        world.tick(SILENCE)
    assert not world.replicas[1].inbox
    assert world.core.watched == 0, "if its host hangs, that is noticed"
    assert world.shown[-1].startswith(
        "NBOS: waiting: replica 0 on host host-0 still runs what a widget (a comm) asked for"
    )
    world.done(0)
    hear_all(world, 0)
    world.tick(SILENCE / 2)
    assert not world.replicas[1].inbox, "it has just come to the cell"
    world.work(0)
    hear_all(world, 0)
    assert world.core.runner.active is not None
    assert world.core.fleet.executor == 0
    world.settle()
    assert world.counts[cell, "reply"] == 1


def test_a_replica_that_is_silent_after_its_callback_is_passed_over_and_the_user_is_told() -> None:
    world, cell = called_back()
    world.done(0)
    hear_all(world, 0)
    world.tick(SILENCE + 0.01)
    world.work(1)
    hear_all(world, 1)
    assert world.core.fleet.executor == 1
    (note,) = world.notes[cell]
    assert "replica 1 on host host-1 has taken over from replica 0 on host host-0 before changes" in note
    world.settle()
    assert world.counts[cell, "reply"] == 1


def test_a_callbacks_replica_that_is_lost_holds_nobody_up() -> None:
    world, cell = called_back()
    world.kill(0, "free")
    world.settle()
    assert world.counts[cell, "reply"] == 1
    (note,) = world.notes[world.execute()]
    assert "was lost before changes made between cells" in note
