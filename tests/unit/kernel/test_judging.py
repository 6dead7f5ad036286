"""What a module must not do when it is imported, if it is to be imported for people who did not ask for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = {
    "fine": ("import json, colorsys\nvalue = 1\n", ""),
    "sets_a_variable": ("import os\nos.environ.setdefault('A_SETTING', '1')\n", ""),
    "prints": ("print('hello')\n", "it prints something"),
    "prints_below": ("import os\nos.write(2, b'hello')\n", "it prints something"),
    "writes": ("open('/tmp/written-by-a-test', 'a')\n", "it writes /tmp/written-by-a-test"),
    "reads_home": ("import os\nopen(os.path.expanduser('~/.secret')).read()\n", "in a home folder"),
    "connects": (
        "import socket\ns = socket.socket()\ns.settimeout(0.01)\ntry: s.connect(('127.0.0.1', 1))\n"
        "except OSError: pass\ns.close()\n",
        "it opens network connections",
    ),
    "starts": ("import subprocess\nsubprocess.run(['true'])\n", "it starts programs"),
    "asks": ("from IPython import get_ipython\nget_ipython()\n", "it asks whether it runs in a notebook"),
    "seeds": ("import random\nrandom.seed(1)\n", "it seeds random numbers"),
    "path": ("import sys\nsys.path.insert(0, '/tmp')\n", "it changes sys.path"),
    "finder": ("import sys\nsys.meta_path.insert(0, sys.meta_path[-1])\n", "it changes how modules are found"),
    "handles": ("import signal\nsignal.signal(signal.SIGUSR1, lambda *_: None)\n", "it changes signal handlers"),
    "logs": ("import logging\nlogging.basicConfig()\n", "it changes logging"),
    "opens": ("file = open('/dev/zero')\n", "opens what forks would share or lose (/dev/zero)"),
    "threads": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n",
        "starts 1 thread(s) that a fork would leave behind",
    ),
    "fails": ("1 / 0\n", "ZeroDivisionError: division by zero"),
    "leaves": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "brings_other": (
        "import of_somebody\n",
        "it loads of_somebody: it is {other}/of_somebody.py, not in this Python's",
    ),
}

PLACES = {
    "of_somebody": "it is {other}/of_somebody.py, not in this Python's folders of installed packages",
    "linked": "it is {other}/of_somebody.py, not in this Python's folders of installed packages",
    "open_to_all": "others may write to {lib}/open_to_all.py",
    "this": "not in this Python's folders of installed packages",
    "numpy.__main__": "it is a program",
    "nowhere": "it is not in this Python's folders of installed packages",
}

SIDE = """
import json, sys
from nbos_kernel.warm import imports, judging
judging.installed_folders = lambda: (sys.argv[1],)
imports.import_needed()
import os
opened = [int(number) for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]
print("ready", flush=True)
found = []
for name in json.loads(sys.argv[2]):
    # A process for each, as after each refusal.
    child = os.fork()
    if not child:
        found = judging.Judge(tuple(opened)).reason(name)
        os.write(int(sys.argv[3]), json.dumps([name, found]).encode() + b"\\n")
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("judging")
    lib, home, other = folder / "lib", folder / "home", folder / "other"
    for each in (lib, home, other):
        each.mkdir()
    (home / ".secret").write_text("x")
    (other / "of_somebody.py").write_text("")
    (lib / "linked.py").symlink_to(other / "of_somebody.py")
    (lib / "open_to_all.py").write_text("")
    (lib / "open_to_all.py").chmod(0o666)
    for name, (source, _) in MODULES.items():
        (lib / f"{name}.py").write_text(source)
    reader, writer = os.pipe()
    names = json.dumps([*MODULES, *PLACES])
    command = [sys.executable, "-Xfrozen_modules=off", "-c", SIDE, str(lib), names, str(writer)]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": f"{lib}:{other}"}
    with open(folder / "log", "wb") as log:
        subprocess.run(command, stdout=log, stderr=log, cwd=folder, env=env, pass_fds=[writer], check=True, timeout=120)
    os.close(writer)
    with os.fdopen(reader) as told:
        found = dict(json.loads(line) for line in told)
    return {name: why.replace(str(other), "{other}").replace(str(lib), "{lib}") for name, why in found.items()}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_judged_by_what_its_import_does(verdicts: dict[str, str], name: str) -> None:
    expected = MODULES[name][1]
    assert expected in verdicts[name] if expected else not verdicts[name]


@pytest.mark.parametrize("name", PLACES)
def test_a_module_is_judged_by_where_it_lies(verdicts: dict[str, str], name: str) -> None:
    assert PLACES[name] in verdicts[name]


def test_a_trial_tells_verdicts_and_ends_with_the_first_that_did_not_pass(tmp_path: Path) -> None:
    import socket

    own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "nbos_kernel.warm", "--judge", str(theirs.fileno())]
    # The second: multiprocessing gives the trial's own program, which may lie anywhere, a second name.
    command += ["numpy", "sklearn.cluster", "this", "scipy"]
    with own, open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, pass_fds=[theirs.fileno()])
        theirs.close()
        told = []
        while data := own.recv(65536):
            told.append(json.loads(data))
        assert process.wait(30) == 0
    assert [(one["module"], one["reason"] != "") for one in told] == [
        ("numpy", False),
        ("sklearn.cluster", False),
        ("this", True),
    ], told
    assert told[0]["seconds"] > 0
