"""Shell and iopub are two connections: in whatever order their messages arrive, a cell's outputs and its idle do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from .world import World

ORDER = st.lists(st.sampled_from(["said", "shown"]), max_size=20)


@given(order=ORDER, outputs=st.integers(0, 5), opened=st.booleans())
def test_every_output_and_the_executors_own_idle_arrive(order: list[str], outputs: int, opened: bool) -> None:
    world = World()
    for index in world.replicas:
        world.link(index)
        world.work(index)
        world.hear(index, "said")
    cell = world.execute()
    if opened:
        world.tick(0.16)  # nobody has answered: the others are asked as well
    for index in world.replicas:
        world.work(index)
    executor = next(index for index, replica in world.replicas.items() if replica.running)
    for _ in range(outputs):
        world.output(executor)
    world.finish(executor, "ok")
    for what in [*order, *["said", "shown"] * (outputs + 5)]:
        world.hear(executor, what)
    world.check_outputs()
    assert len(world.numbers[cell]) == 1 + outputs
    # Nobody's patience has run out: this idle is the replica's, not one that the router had to make up.
    assert {what: world.counts[cell, what] for what in ("busy", "reply", "idle")} == {"busy": 1, "reply": 1, "idle": 1}
    assert world.core.runner.active is None
