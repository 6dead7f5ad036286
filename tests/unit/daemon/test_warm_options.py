"""What a site may say about warm replicas, and when a kernel's environment rules one out."""

from __future__ import annotations

from typing import Any

import pytest
from traitlets import TraitError
from traitlets.config import Config

from gpu_daemon.app import GPUDaemon
from gpu_daemon.warm_config import Warm
from gpu_daemon.warm_process import Ready, environment_reads


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules": ["os;rm"]}, "'os;rm', which is no module's name"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"reserve": "much"}, "much"),
        ({"keep": 5, "most": 4}, "Warm.keep is 5, Warm.most only 4"),
    ],
)
def test_what_cannot_be_is_named_with_the_way_out(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TraitError, match=words):
        Warm(**options).options()


def test_options_reach_the_policy() -> None:
    options = Warm(policy="fixed", keep=2, modules=["numpy"], reserve="2G").options()
    assert (options.policy.kind, options.policy.keep, options.policy.reserve) == ("fixed", 2, 2 << 30)
    assert options.modules == ("numpy",)


def test_nothing_is_started_ahead_where_it_is_off_or_what_replicas_run_is_not_known() -> None:
    def options(**config: Any) -> object:
        return GPUDaemon(config=Config(config), run_dir="/tmp/never-made").warm_options()

    assert options() is not None
    assert options(Warm={"policy": "off"}) is None
    assert options(GPUDaemon={"replica_command": ["python", "mine.py"]}) is None


def test_only_variables_that_were_read_and_differ_want_a_fresh_start() -> None:
    ready, base = Ready(reads=frozenset({"HOME", "DISPLAY"})), {"HOME": "/h", "PATH": "/bin", "PYTHONPATH": "/p"}
    assert environment_reads(ready, base, base) == []
    assert environment_reads(ready, base, {**base, "JPY_SESSION_NAME": "n", "PATH": "/else"}) == []
    assert environment_reads(ready, base, {**base, "DISPLAY": ":0", "OMP_NUM_THREADS": "2"}) == [
        "DISPLAY",
        "OMP_NUM_THREADS",
    ]
    assert environment_reads(ready, base, {"PATH": "/bin"}) == ["HOME", "PYTHONPATH"]
