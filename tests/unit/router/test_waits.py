"""What a user sees while the changes of a cell are replicated: in that cell, and in the one that waits for it."""

from __future__ import annotations

from nbos_provisioner.notices import NOBODY

from .world import World


def ran(world: World, *, busy: bool = False) -> tuple[str, int]:
    """A cell that has run and been answered, and is not in the log: its request, and its executor."""
    for index in world.replicas:
        world.link(index)
        world.work(index)
        world.hear(index, "said")
    cell = world.execute()
    world.work(0)
    world.finish(0, "ok", busy=busy)
    listen(world)
    return cell, 0


def listen(world: World, index: int = 0) -> None:
    for _ in range(10):
        world.hear(index, "said")
        world.hear(index, "shown")


def texts(world: World, cell: str) -> list[str]:
    return [text for steps in world.displays.values() for _, msg_id, text in steps if msg_id == cell]


def test_progress_after_idle_is_one_display_of_the_cell_that_ends_in_one_line() -> None:
    world = World()
    cell, executor = ran(world)
    assert texts(world, cell) == []
    world.progress(executor)
    world.progress(executor)
    listen(world)
    world.now += 2.0
    world.commit(executor)
    world.progress(executor)  # nothing of it comes: it is over
    listen(world)
    shown = texts(world, cell)
    assert [text.rpartition(":")[0] for text in shown[:2]] == ["NBOS: replicating x"] * 2
    assert shown[2:] == ["NBOS: replicated x in 3.0 s"]
    assert {what: world.counts[cell, what] for what in ("busy", "reply", "idle")} == {"busy": 1, "reply": 1, "idle": 1}
    world.check_displays()


def test_the_waiting_cell_shows_the_same_reason_and_where_it_ran_at_the_end() -> None:
    world = World()
    cell, executor = ran(world)
    following = world.execute()
    world.progress(executor)
    listen(world)
    (reason,) = texts(world, following)
    assert reason == f"NBOS: waiting: {texts(world, cell)[-1].removeprefix('NBOS: ')}; " + (
        "interrupt the cell to leave the queue"
    )
    world.settle()
    assert texts(world, following)[-1].startswith("NBOS: waited")
    assert texts(world, cell)[-1].startswith("NBOS: replicated x in")
    world.check_displays()


def test_a_cell_that_nobody_answers_says_that_the_one_before_is_being_stored() -> None:
    world = World()
    ran(world)
    following = world.execute()
    world.tick(NOBODY / 2)
    assert texts(world, following) == []
    assert world.core.deadline() is not None
    world.tick(NOBODY)
    (text,) = texts(world, following)
    assert "what the cell before has changed is being captured and stored" in text


def test_a_replica_that_stores_on_its_main_thread_does_not_hold_back_idle_and_the_next_cells_reason() -> None:
    world = World()
    cell, executor = ran(world, busy=True)
    following = world.execute()
    world.output(executor)
    assert (world.counts[cell, "idle"], world.counts[following, "busy"]) == (0, 0)
    world.progress(executor)
    world.progress(executor)
    listen(world)
    assert (world.counts[cell, "idle"], world.counts[following, "busy"]) == (1, 1)
    assert texts(world, following) == [
        f"NBOS: waiting: replicating x: {world.made}; interrupt the cell to leave the queue"
    ]
    world.settle()
    assert world.counts[cell, "idle"] == 1
    assert {world.counts[following, what] for what in ("busy", "reply", "idle")} == {1}


def test_a_durable_kernels_reply_after_its_commit_is_the_cells_reply() -> None:
    world = World()
    for index in world.replicas:
        world.link(index)
        world.work(index)
        world.hear(index, "said")
    cell = world.execute()
    world.work(0)
    world.finish_durably(0, "error")
    listen(world)
    assert world.replies == [(cell, "error")]
    assert world.core.runner.active is None
    assert world.core.runner.unsettled is None


def test_a_silent_cell_shows_nothing() -> None:
    world = World()
    cell, executor = ran(world)
    world.commit(executor)
    listen(world)
    silent = world.execute(silent=True)
    world.work(executor)
    world.finish(executor, "ok")
    listen(world)
    world.progress(executor)
    listen(world)
    assert (texts(world, cell), texts(world, silent)) == ([], [])


def test_a_lost_executor_ends_its_display_and_says_what_became_of_it() -> None:
    world = World()
    cell, executor = ran(world)
    world.progress(executor)
    listen(world)
    world.kill(executor, "abandoned")
    world.settle()
    assert texts(world, cell)[-1].startswith("NBOS: not replicated: replica 0 on host host-0 was lost")
    world.check_displays()


def test_a_replica_that_was_cut_off_moves_no_display() -> None:
    world = World()
    cell, executor = ran(world)
    world.progress(executor)
    token = world.replicas[executor].token
    world.replicas[executor].token = token - 1
    world.progress(executor)
    listen(world)
    assert len(texts(world, cell)) == 1
