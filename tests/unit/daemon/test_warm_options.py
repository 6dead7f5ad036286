"""What a site may say about warm replicas, and when a kernel's environment rules one out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from traitlets import TraitError
from traitlets.config import Config

from gpu_daemon import requests
from gpu_daemon.app import GPUDaemon
from gpu_daemon.warm_config import Warm
from gpu_daemon.warm_fit import shadowing, why_afresh
from gpu_daemon.warm_learning import environment
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
    ready, base = (
        Ready(reads=frozenset({"HOME", "DISPLAY"}), below=("OMP_", "PYTHON")),
        {"HOME": "/h", "PATH": "/bin", "PYTHONPATH": "/p"},
    )
    assert environment_reads(ready, base, base) == []
    assert environment_reads(ready, base, {**base, "JPY_SESSION_NAME": "n", "PATH": "/else"}) == []
    assert environment_reads(ready, base, {**base, "DISPLAY": ":0", "OMP_NUM_THREADS": "2"}) == [
        "DISPLAY",
        "OMP_NUM_THREADS",
    ]
    assert environment_reads(ready, base, {"PATH": "/bin"}) == ["HOME", "PYTHONPATH"]


def test_a_file_of_a_modules_name_in_the_replicas_folder_wants_a_fresh_start(tmp_path: Path) -> None:
    tops = frozenset({"pandas", "numpy", "six"})
    for name in ("data.py", "pandas.csv", "numpy.ipynb", "six.txt"):
        (tmp_path / name).touch()
    (tmp_path / "numpy").mkdir()  # no package: the installed one goes before it
    assert shadowing(str(tmp_path), tops) == ""
    (tmp_path / "numpy" / "__init__.py").touch()
    assert shadowing(str(tmp_path), tops) == "numpy"
    (tmp_path / "numpy" / "__init__.py").unlink()
    (tmp_path / "six.cpython-311-x86_64-linux-gnu.so").touch()
    (tmp_path / "pandas.py").touch()
    assert shadowing(str(tmp_path), tops) == "pandas.py"
    assert shadowing(str(tmp_path / "not there"), tops) == ""


async def test_nothing_is_forked_from_a_parent_of_before_an_installation() -> None:
    ready = Ready(tops=frozenset({"numpy"}))
    assert await why_afresh(ready, {}, {}, "/", environment()) == ""
    assert "packages have changed" in await why_afresh(ready, {}, {}, "/", "before")
    assert await why_afresh(Ready(), {}, {}, "/", "before") == ""


def test_what_a_replica_says_it_imported_is_read_with_suspicion() -> None:
    said = ["numpy", "a.b", "a b", "os;rm", "-c", "", ".x", 7, "x" * 201]
    assert requests.imported({"imported": said}) == ("numpy", "a.b")
    assert requests.imported({"imported": "numpy"}) == requests.imported({}) == ()
    assert len(requests.imported({"imported": [f"m{i}" for i in range(500)]})) == requests.MAX_IMPORTED
