"""Whatever order leads, yields, outputs, losses, duplicates, interrupts and errors come in: one busy, one reply, one
idle a cell, and every output of the replica that ran it; whatever else is said to be busy is idle in the end.

Shell and iopub are two connections: what a replica says on one overtakes what it says on the other.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbos_provisioner.instructions import Alive

from .world import GRANT, SUBSHELL, USED, World

REPLICA = st.integers(0, 2)


class RouterMachine(RuleBasedStateMachine):
    @initialize(rerun=st.booleans(), gpu=st.booleans())
    def begin(self, rerun: bool, gpu: bool) -> None:
        self.world = World(rerun=rerun, line_after=0.1)
        if gpu:
            self.world.grant, self.world.used = GRANT, USED

    @rule(silent=st.booleans())
    def execute(self, silent: bool) -> None:
        self.world.execute(silent=silent)

    @rule(kind=st.sampled_from(["complete_request", "comm_msg", "kernel_info_request"]))
    def ask(self, kind: str) -> None:
        self.world.ask(kind, {})

    @rule(kind=st.sampled_from(["execute_request", "comm_msg", "complete_request"]))
    def ask_subshell(self, kind: str) -> None:
        self.world.ask(kind, {"code": "x"}, subshell=SUBSHELL)

    @rule(kind=st.sampled_from(["create_subshell_request", "delete_subshell_request"]))
    def change_subshells(self, kind: str) -> None:
        self.world.ask(kind, {"subshell_id": SUBSHELL}, "control")

    @rule(index=REPLICA)
    def beat(self, index: int) -> None:
        if self.world.replicas[index].linked:
            self.world.event(Alive(index))

    @rule(index=REPLICA, slow=st.booleans())
    def callbacks_last(self, index: int, slow: bool) -> None:
        self.world.replicas[index].slow = slow

    @rule(index=REPLICA)
    def done(self, index: int) -> None:
        self.world.done(index)

    @rule()
    def interrupt(self) -> None:
        self.world.send("interrupt_request", {}, "control")

    @rule(index=REPLICA)
    def link(self, index: int) -> None:
        self.world.link(index)

    @rule(index=REPLICA)
    def cut(self, index: int) -> None:
        self.world.cut(index)

    @rule(index=REPLICA, fate=st.sampled_from(["abandoned", "free", "committed"]))
    def kill(self, index: int, fate: str) -> None:
        self.world.kill(index, fate)

    @rule(index=REPLICA)
    def work(self, index: int) -> None:
        self.world.work(index)

    @rule(index=REPLICA, what=st.sampled_from(["said", "shown"]), twice=st.booleans())
    def hear(self, index: int, what: str, twice: bool) -> None:
        self.world.hear(index, what, twice=twice)

    @rule(index=REPLICA, first=st.sampled_from(["said", "shown"]))
    def overtake(self, index: int, first: str) -> None:
        """All of one channel arrives before anything of the other."""
        for _ in range(10):
            self.world.hear(index, first)

    @rule(index=REPLICA)
    def show(self, index: int) -> None:
        self.world.output(index)

    @rule(index=REPLICA, status=st.sampled_from(["ok", "error"]), busy=st.booleans())
    def finish(self, index: int, status: str, busy: bool) -> None:
        self.world.finish(index, status, busy=busy)

    @rule(index=REPLICA, status=st.sampled_from(["ok", "error"]))
    def finish_durably(self, index: int, status: str) -> None:
        self.world.finish_durably(index, status)

    @rule(index=REPLICA, state=st.sampled_from(["waiting", "waiting", "granted", "left"]))
    def touch(self, index: int, state: str) -> None:
        self.world.touch(index, state)

    @rule(index=REPLICA)
    def progress(self, index: int) -> None:
        self.world.progress(index)

    @rule(index=REPLICA)
    def commit(self, index: int) -> None:
        self.world.commit(index)

    @rule(index=REPLICA)
    def no_room(self, index: int) -> None:
        self.world.replicas[index].busy = True

    @rule(index=REPLICA)
    def room(self, index: int) -> None:
        self.world.room(index)

    @rule(index=REPLICA)
    def no_gpu(self, index: int) -> None:
        self.world.refusing.add(index)

    @rule(gone=st.sets(REPLICA))
    def records(self, gone: set[int]) -> None:
        """Leases end, and daemons write their records again: nobody need have died."""
        self.world.members(dict.fromkeys(gone, "lost"))

    @rule()
    def bustle(self) -> None:
        """Everybody who can does one thing: without it, random orders seldom get far."""
        for index in self.world.replicas:
            self.world.link(index)
            self.world.work(index)
            self.world.hear(index, "said")
            self.world.hear(index, "shown")

    @rule(seconds=st.sampled_from([0.01, 0.16, 1.1, 3.1]))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @invariant()
    def nothing_twice(self) -> None:
        if hasattr(self, "world"):
            for msg_id in self.world.sent:
                for what in ("busy", "reply", "idle"):
                    assert self.world.counts[msg_id, what] <= 1, (msg_id, what)

    @invariant()
    def replies_keep_their_order(self) -> None:
        if hasattr(self, "world"):
            replied = [msg_id for msg_id, _ in self.world.replies]
            assert replied == [msg_id for msg_id in self.world.sent if msg_id in set(replied)]

    @invariant()
    def tokens_never_fall(self) -> None:
        if hasattr(self, "world"):
            cells = [(token, msg_id) for _, token, msg_id in self.world.published]
            by_cell: dict[str, int] = {}
            for token, msg_id in cells:
                assert by_cell.get(msg_id, 0) <= token
                by_cell[msg_id] = token

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()
            self.world.check_outputs()
            self.world.check_displays()
            for msg_id in self.world.sent:
                counts = {what: self.world.counts[msg_id, what] for what in ("busy", "reply", "idle")}
                assert counts == {"busy": 1, "reply": 1, "idle": 1}, (msg_id, counts)
            for msg_id in self.world.asked:
                assert self.world.states.get(msg_id) != "busy", msg_id


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
