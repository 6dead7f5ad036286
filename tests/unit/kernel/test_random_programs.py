"""Random small programs: after every cell a standby holds the executor's names, and after every failover the new
executor is deeply what a plain Python run is: values, types, and what is the same object.

Nothing may be silently different. What cannot be replicated is named as lost, with the reason; it is then gone in the
plain run too. The programs are the same in every run; `NBOS_RANDOM_EXAMPLES=2000` makes as many others.
"""

from __future__ import annotations

import gc
import os

from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.fidelity import programs

from .against_plain import Against

EXAMPLES = int(os.environ.get("NBOS_RANDOM_EXAMPLES", "0"))


class Programs(RuleBasedStateMachine):
    extra: tuple[tuple[str, ...], ...] = ()

    @initialize()
    def begin(self) -> None:
        gc.collect()  # the shells of the example before
        self.both = Against()

    @rule(data=st.data())
    def cell(self, data: st.DataObject) -> None:
        code = data.draw(programs.cells(*self.extra))
        note(code)
        self.both.cell(code)
        executor, standby = self.both.pair.executor, self.both.pair.standby
        here = [name for name in programs.NAMES if name in executor.ns and name not in standby.replica.lost]
        assert [name for name in programs.NAMES if name in standby.ns] == here

    @rule()
    def fail_over(self) -> None:
        note(f"-- failover, lost: {self.both.fail_over()}")
        assert self.both.difference() == ""

    def teardown(self) -> None:
        if hasattr(self, "both"):
            self.fail_over()


class WithNumPy(Programs):
    extra = (programs.NUMPY,)


class WithPandas(Programs):
    extra = (programs.PANDAS, programs.PANDAS, programs.NUMPY)


class WithTorch(Programs):
    extra = (programs.TORCH, programs.TORCH, programs.NUMPY)


TestPrograms = Programs.TestCase
TestNumPy = WithNumPy.TestCase
TestPandas = WithPandas.TestCase
TestTorch = WithTorch.TestCase
for case in (TestPrograms, TestNumPy, TestPandas, TestTorch):
    case.settings = settings(
        max_examples=EXAMPLES or 8,
        stateful_step_count=12,
        deadline=None,
        # The same programs in every run: a red test means that something changed, not luck.
        derandomize=not EXAMPLES,
        database=None,
        phases=[Phase.generate] if not EXAMPLES else list(Phase),
        suppress_health_check=list(HealthCheck),
    )

del case
