"""Modules that were imported ahead: a program that imports them finds what it would find in a fresh process, whatever
lies beside it. Each side is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGES = {
    "pack/__init__.py": "from .least import least\nfrom . import inner\nimport warnings, os\n"
    "warnings.filterwarnings('ignore', message='of pack')\nos.environ.setdefault('PACK', 'was here')\n",
    "pack/least.py": "def least(): return 1\n",
    "pack/inner.py": "import helper_of_pack, sys\nsys.modules['pack.made'] = type(sys)('pack.made')\n",
    "pack/extra.py": "import pack.other\n",
    "pack/other.py": "",
    "helper_of_pack.py": "import sys\nclass Finder:\n    @staticmethod\n    def find_spec(*a): return None\n"
    "sys.meta_path.append(Finder)\n",
    "later.py": "def use():\n    import late_one\n    return late_one\n",
    "late_one.py": "",
    "reads.py": "import os\nvalue = os.environ.get('READ_BY_IT')\n",
}

SIDE = """
import json, os, sys, warnings
from nbos_kernel.warm import ahead, imports
chosen, code = json.loads(sys.argv[1]), sys.argv[2]
found = imports.import_all(chosen, (0, 1, 2))
ahead.begun()
before = set(sys.modules)
import importlib.util
scope = {}
exec(code, scope)
new = sorted(set(sys.modules) - before)
facts = {
    "new": new,
    "attributes": {name: sorted(set(vars(sys.modules[name])) - {"__warningregistry__"}) for name in new},
    "specs": {name: str(getattr(sys.modules[name].__spec__, "loader", None)).split(" object")[0] for name in new},
    "filters": [str(f) for f in warnings.filters],
    "environ": dict(os.environ),
    "finders": [str(finder).split(" at 0x")[0] for finder in sys.meta_path if not isinstance(finder, ahead.Ahead)],
    "said": scope.get("said"),
}
print(json.dumps([facts, found.failed, found.tops]))
"""


def side(folder: Path, chosen: list[str], code: str, **env: str) -> tuple[dict[str, Any], list[str]]:
    command = [sys.executable, "-Xfrozen_modules=off", "-c", SIDE, json.dumps(chosen), code]
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(folder / "lib"), **env}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    facts, failed, tops = json.loads(done.stdout.splitlines()[-1])
    assert not failed
    return facts, tops


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, source in PACKAGES.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


CODES = [
    "pass",
    "import pack",
    "import pack.least; from pack import least; said = str(type(least)); import pack.made",
    "import helper_of_pack",
    "from pack import extra",
    "import later; said = later.use().__name__",
    "said = importlib.util.find_spec('pack').origin.endswith('pack/__init__.py')\nimport importlib.util",
    "import pack, importlib; importlib.reload(pack)",
]


@pytest.mark.parametrize("code", CODES)
def test_a_program_finds_what_it_finds_in_a_fresh_process(folder: Path, code: str) -> None:
    code = "import importlib.util\n" + code
    fresh, _ = side(folder, [], code)
    warm, tops = side(folder, ["pack.extra", "later", "late_one"], code)
    assert warm == fresh
    assert tops == ["helper_of_pack", "late_one", "later", "pack"]


def test_the_users_own_module_of_that_name_wins_when_it_is_there_before_the_import(folder: Path) -> None:
    code = "import os, sys; os.mkdir('mine'); open('mine/pack.py', 'w').write('who = 1'); sys.path.insert(0, 'mine')\n"
    code += "import pack, helper_of_pack; said = [pack.who, hasattr(pack, 'least'), helper_of_pack.__file__]"
    warm, _ = side(folder, ["pack.extra"], code)
    assert warm["said"] == [1, False, str(folder / "lib" / "helper_of_pack.py")]


def test_what_was_uninstalled_is_not_found_and_what_was_replaced_is_said(folder: Path) -> None:
    code = "import os, warnings\nos.remove('lib/late_one.py')\ntry:\n    import late_one\nexcept ImportError as err:\n"
    code += "    said = [str(err)]\nopen('lib/later.py', 'a').write('# 2')\n"
    code += "with warnings.catch_warnings(record=True) as w:\n"
    code += "    warnings.simplefilter('always')\n    import later\nsaid += [str(one.message) for one in w]"
    warm, _ = side(folder, ["later", "late_one"], code)
    missing, replaced = warm["said"]
    assert missing == "No module named 'late_one'"
    assert "later has changed on the disk since this process imported it" in replaced


def test_a_variable_that_the_import_read_and_the_user_sets_later_is_said(folder: Path) -> None:
    code = "import os, warnings\nos.environ.update(READ_BY_IT='1', OMP_NUM_THREADS='1', PATH='/', ELSE='1')\n"
    code += "with warnings.catch_warnings(record=True) as w:\n    import reads\nsaid = str(w[0].message)"
    warm, _ = side(folder, ["reads"], code)
    assert "NBOS: OMP_NUM_THREADS, READ_BY_IT was set after" in warm["said"]


def test_matplotlib_takes_backend_and_settings_from_where_the_kernel_is(folder: Path) -> None:
    code = "import os\nopen('matplotlibrc', 'w').write('lines.linewidth: 7')\nos.environ['MPLBACKEND'] = 'svg'\n"
    code += "import matplotlib.pyplot as plt, sys\nsaid = [plt.rcParams['lines.linewidth'], plt.get_backend(),"
    code += " 'pandas' in sys.modules, plt.plot([1, 2])[0].get_linewidth()]"
    cache = {"MPLCONFIGDIR": str(folder / "mpl")}
    fresh, _ = side(folder, [], code, **cache)
    warm, _ = side(folder, ["matplotlib.pyplot", "pandas"], code, **cache)
    assert warm["said"] == fresh["said"] == [7.0, "svg", False, 7.0]
    mine = ("matplotlib", "numpy", "PIL", "dateutil")
    assert [n for n in warm["new"] if n.startswith(mine)] == [n for n in fresh["new"] if n.startswith(mine)]
