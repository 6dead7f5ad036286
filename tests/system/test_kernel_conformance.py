"""The kernelspec "Python 3 (NBOS)" behaves as a Jupyter kernel: judged by tests that were written by others.

`jupyter_kernel_test` in this process, and ipykernel's own tests, taken from the source distribution of the installed
version (its wheel holds none), in a process of their own. Both start kernels with jupyter_client in the environment of
a Jupyter Server of a running `nbos up`. NBOS_CONFORMANCE_KERNEL=python3 runs the same against plain ipykernel: what
fails there too is not ours.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from jupyter_kernel_test import KernelTests

from tests.system.nbosenv import ROOT, kernel_environment, kernelspec_name
from tests.system.sides import nbos_hub

pytestmark = pytest.mark.timeout(600)

PLAIN = os.environ.get("NBOS_CONFORMANCE_KERNEL", "")

UPSTREAM = ("test_message_spec.py", "test_kernel.py", "test_async.py", "test_subshells.py", "test_debugger.py")
"""ipykernel's test modules that start a kernel by its kernelspec and talk to it."""

TESTS = "ipykernel_tests"

CANNOT: dict[str, str] = {
    # test or module: why it cannot be pointed at a kernelspec
    "test_io.py": "builds ipykernel's OutStream and IOPubThread in the test's own process; no kernel is started",
    "test_comm.py": "builds comms on a mock kernel in the test's own process",
    "test_connect.py": "reads connection files that the test writes; no kernel is started",
    "test_curve.py": "starts `python -m ipykernel` itself, or checks IPKernelApp in the test's own process",
    "test_displayhook.py": "builds display hooks in the test's own process",
    "test_embed_kernel.py": "runs programs that call embed_kernel()",
    "test_eventloop.py": "GUI event loops on a mock kernel; the one test with a kernel wants a GUI toolkit",
    "test_heartbeat.py": "builds ipykernel's Heartbeat thread in the test's own process",
    "test_ipkernel_direct.py": "calls an IPythonKernel object in the test's own process",
    "test_jsonutil.py": "calls ipykernel's functions",
    "test_kernel_direct.py": "calls a Kernel object in the test's own process",
    "test_kernelapp.py": "builds IPKernelApp in the test's own process",
    "test_kernelspec.py": "tests `ipykernel install`",
    "test_matplotlib_eventloops.py": "needs a display and a GUI toolkit",
    "test_parentpoller.py": "a thread that watches the parent process, in the test's own process",
    "test_start_kernel.py": "runs programs that call start_kernel()",
    "test_subshell_wedge.py": "builds a SubshellManager in the test's own process",
    "test_zmq_shell.py": "builds a shell in the test's own process",
    "test_kernel.py::test_sys_path_profile_dir": "gives the kernel's process an option that names a folder of this "
    "machine; replicas are started by daemons of other hosts",
    "test_kernel.py::test_parent_header_and_ident": "wants ipykernel's private _parent_ident to hold one identity; "
    "behind a router it holds the router's as well",
}


@pytest.fixture(scope="module", autouse=True)
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The kernelspec under test; the environment is that of a Jupyter Server meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        if PLAIN:
            KernelConformance.kernel_name = PLAIN
            yield PLAIN
            return
        with nbos_hub() as hub:
            env = asyncio.run(kernel_environment(hub.hub, "conformance"))
            for name, value in env.items():
                patch.setenv(name, value)
            KernelConformance.kernel_name = kernelspec_name(env)
            yield KernelConformance.kernel_name


class KernelConformance(KernelTests):
    """What jupyter_kernel_test needs to know about Python."""

    __test__ = False
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples = [{"text": "zi", "matches": {"zip"}}]  # noqa: RUF012  upstream's attribute
    complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"]  # noqa: RUF012
    incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2"]  # noqa: RUF012
    invalid_code_samples = ["import = 7q"]  # noqa: RUF012
    code_page_something = "zip?"
    code_generate_error = "raise ValueError('told you')"
    code_execute_result = [  # noqa: RUF012
        {"code": "1+2+3", "result": "6"},
        {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"},
    ]
    code_display_data = [  # noqa: RUF012
        {"code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))", "mime": "text/html"},
        {"code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))", "mime": "text/latex"},
    ]  # fmt: skip
    code_history_pattern = "1?2*"
    # Not "range": plain ipykernel numbers the session under way 0 there, this test wants its real number.
    supported_history_operations = ("tail", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"


class TestJupyterKernelTest(KernelConformance):
    __test__ = True


# The base class is a TestCase too; only its child is to be collected, once.
del KernelTests


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree of the installed ipykernel's tests."""
    folder = tmp_path_factory.mktemp("ipykernel")
    release = f"ipykernel=={version('ipykernel')}"
    wanted = [sys.executable, "-m", "pip", "download", release, "--no-binary", "ipykernel", "--no-deps"]
    done = subprocess.run([*wanted, "--dest", str(folder)], capture_output=True, text=True, timeout=300, check=False)
    found = [Path(given)] if (given := os.environ.get("NBOS_IPYKERNEL_SDIST")) else [*folder.glob("*.tar.gz")]
    if not found:
        pytest.fail(
            f"the tests of {release} could not be fetched: {done.stderr[-600:]}\n"
            "Without a network name a downloaded ipykernel-*.tar.gz in NBOS_IPYKERNEL_SDIST."
        )
    with tarfile.open(found[0]) as archive:
        # `filter="data"`, which Python has since 3.11.4
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(folder)
    # Only the tests: the package beside them would hide the installed one; renamed, they do not hide ours.
    home = folder / "upstream"
    home.mkdir()
    next(folder.glob("ipykernel-*/tests")).rename(home / TESTS)
    settings = "asyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\ntimeout = 100\n"
    (home / "pytest.ini").write_text(f"[pytest]\n{settings}")
    return home


@pytest.mark.parametrize("module", UPSTREAM)
def test_ipykernels_own_tests_pass(module: str, upstream: Path, kernel: str) -> None:
    left_out = [f"--deselect={TESTS}/{name}" for name in CANNOT if name.startswith(f"{module}::")]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "tests.system.upstream_kernel"]
    done = subprocess.run(
        [*command, *left_out, f"{TESTS}/{module}"],
        cwd=upstream,
        env={**os.environ, "NBOS_UPSTREAM_KERNEL": kernel, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-12_000:] + done.stderr[-2000:]


def test_every_module_of_ipykernels_tests_is_run_or_named(upstream: Path) -> None:
    modules = {path.name for path in (upstream / TESTS).glob("test_*.py")}
    assert modules == {*UPSTREAM, *(name for name in CANNOT if "::" not in name)}
