"""Random programs on two kernels, with failovers: one whose standbys hold everything, one whose standbys leave every
component unloaded. What the user sees is the same."""

from __future__ import annotations

import contextlib
import io
import os
import warnings

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.fidelity import programs
from tests.fidelity.describe import Describer

from .pair import Pair, Side

# A program may start a thread that fails, on both kernels.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

EXAMPLES = int(os.environ.get("NBOS_RANDOM_EXAMPLES", "0"))


def described(side: Side) -> dict[str, str]:
    """Values, and which of them are the same object, over the whole namespace at once."""
    describer, found = Describer(side.ns), {}
    for name in programs.NAMES:
        if name in side.ns:
            try:
                found[name] = repr(describer.of(side.ns[name]))
            except Exception as err:  # noqa: BLE001 - a half-made object fails on both kernels
                found[name] = type(err).__name__
    return found


class LazyPrograms(RuleBasedStateMachine):
    extra: tuple[tuple[str, ...], ...] = (programs.NUMPY,)

    @initialize()
    def begin(self) -> None:
        self.eager, self.lazy = Pair(), Pair(lazy=1)

    @rule(data=st.data())
    def cell(self, data: st.DataObject) -> None:
        code = data.draw(programs.cells(*self.extra))
        note(code)
        for pair in (self.eager, self.lazy):
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                with contextlib.redirect_stderr(io.StringIO()):
                    pair.cell(code)
        for eager, lazy in ((self.eager.executor, self.lazy.executor), (self.eager.standby, self.lazy.standby)):
            there = {name for name in programs.NAMES if name in lazy.ns or name in lazy.replica.lazy.table}
            lost = lazy.replica.lost.keys() | eager.replica.lost.keys()
            assert there - lost == {name for name in programs.NAMES if name in eager.ns} - lost

    @rule()
    def fail_over(self) -> None:
        note("-- failover")
        self.eager.switch()
        self.lazy.switch()

    @rule()
    def look(self) -> None:
        note("-- look at everything")
        side = self.lazy.executor
        side.replica.lazy.load_all()
        assert described(side) == described(self.eager.executor)
        names = {name for name in side.replica.lost if name in programs.NAMES}
        assert names == {name for name in self.eager.executor.replica.lost if name in programs.NAMES}

    def teardown(self) -> None:
        if hasattr(self, "lazy"):
            self.look()
            self.fail_over()
            self.look()


TestLazyPrograms = LazyPrograms.TestCase
TestLazyPrograms.settings = settings(
    max_examples=EXAMPLES or 12,
    stateful_step_count=14,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
