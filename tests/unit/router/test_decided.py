"""A number that is decided while a replica that was asked is silent: it may have been that very cell, which must not
run under another number as well.
"""

from __future__ import annotations

from .world import World


def silent_winner() -> tuple[World, str]:
    """A cell that replica 0 ran and committed, of which the router has heard nothing; the others were asked, too, and
    say that its number is decided."""
    world = World()
    for index in world.replicas:
        world.link(index)
        world.work(index)
        world.hear(index, "said")
    cell = world.execute()
    world.work(0)
    world.finish(0, "ok")
    world.commit(0)
    world.tick(0.16)
    for _ in range(3):
        for index in (1, 2):
            world.work(index)
            world.hear(index, "said")
        world.tick(0.2)
    return world, cell


def test_the_lead_that_comes_late_is_believed() -> None:
    world, cell = silent_winner()
    assert world.runs[cell] == 1
    world.settle()
    assert world.runs[cell] == 1
    assert {what: world.counts[cell, what] for what in ("busy", "reply", "idle")} == {"busy": 1, "reply": 1, "idle": 1}


def test_a_winner_that_is_lost_unheard_is_asked_after_and_not_run_again() -> None:
    world, cell = silent_winner()
    world.kill(0, "free")
    world.settle()
    assert world.runs[cell] == 1
    assert world.counts[cell, "reply"] == 1


def test_what_became_of_a_cell_after_its_reply_is_told_in_the_next_one() -> None:
    """In the output of one still later, "the previous cell" would be another."""
    world = World()
    for index in world.replicas:
        world.link(index)
        world.work(index)
        world.hear(index, "said")
    world.execute()
    world.work(0)
    world.hear(0, "said")
    world.finish(0, "ok")
    world.hear(0, "said")
    world.hear(0, "shown")
    following = world.execute()
    world.kill(0, "abandoned")
    world.settle()
    assert any("lost before the changes of the previous cell were stored" in text for text in world.notes[following])
