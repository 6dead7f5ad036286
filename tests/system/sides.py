"""Two ways to a running hub, started and ended by the one who asks: a stock JupyterHub, and `nbos up`.

Guarantees: whatever a block started has ended when it ends, found by process id; nothing is written outside
a directory of its own under the system's temporary one; when it does not come up, the end of its log is
shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tornado.httpclient import AsyncHTTPClient

from tests.system.hubclient import Hub, Server
from tests.system.nbosenv import DISPLAY_NAME, entered, environment
from tests.system.ports import free_port

PLAIN_KERNEL = "python3"

STOCK_CONFIG = """
c.JupyterHub.bind_url = {url!r}
c.JupyterHub.hub_port = {hub_port}
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {home!r} + "/{{username}}"
c.Spawner.args = ["--allow-root"]
c.Spawner.start_timeout = 120
c.Spawner.http_timeout = 120
c.Spawner.environment = {{"JUPYTER_PREFER_ENV_PATH": "1"}}
c.JupyterHub.services = [{{"name": "bench", "api_token": {token!r}}}]
c.JupyterHub.load_roles = [{{"name": "bench", "services": ["bench"],
    "scopes": ["admin:users", "admin:servers", "access:servers", "list:users", "tokens"]}}]
c.ConfigurableHTTPProxy.command = [{python!r}, "-c", "from configurable_http_proxy.cli import main; main()"]
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{proxy_port}"
c.ConfigurableHTTPProxy.auth_token = {proxy_token!r}
"""


@dataclass
class Running:
    """One side under test: its hub, where it keeps its files, and the process that started it all."""

    name: str
    hub: Hub
    directory: Path
    process: psutil.Popen
    kernel: str
    """The display name of the kernelspec to use."""
    ready_after: float = 0.0
    """Seconds from the command to the login page."""

    @property
    def log(self) -> Path:
        return self.directory / "log.txt"

    async def server(self, user: str, options: dict[str, Any] | None = None) -> Server:
        """The user's running server, reached with a token of the user's own."""
        await self.hub.start_server(user, options, timeout=120)
        return Server(self.hub.as_user(await self.hub.user_token(user)), user)

    async def start_kernel(self, server: Server, timeout: float = 60.0) -> str:
        return await server.start_kernel(await self.kernelspec(server), timeout)

    async def kernelspec(self, server: Server) -> str:
        specs = await server.kernelspecs()
        names = [name for name, spec in specs.items() if spec["spec"]["display_name"] == self.kernel]
        if not names and self.kernel == PLAIN_KERNEL:
            names = [PLAIN_KERNEL] if PLAIN_KERNEL in specs else []
        if not names:
            shown = ", ".join(f"{name} ({spec['spec']['display_name']})" for name, spec in specs.items())
            raise LookupError(f"{self.name} has no kernelspec {self.kernel!r}; it has: {shown}")
        return names[0]

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def start(command: Sequence[str], directory: Path, env: dict[str, str] | None = None) -> psutil.Popen:
    """Start a process whose output goes to log.txt in `directory`, in a session of its own."""
    with (directory / "log.txt").open("ab") as log:
        return psutil.Popen(
            command, cwd=directory, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            env=env or environment(), start_new_session=True,
        )  # fmt: skip


def stop(process: psutil.Popen, patience: float = 30.0) -> list[str]:
    """Ctrl-C, then what is left is killed by its id. The command lines of those that had to be killed."""
    family = [process, *process.children(recursive=True)] if process.is_running() else []
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(patience)
    # An orphan that outlives its parent by a moment is no leak.
    _, left = psutil.wait_procs(family, timeout=3.0)
    leftovers = []
    for orphan in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            if orphan.status() == psutil.STATUS_ZOMBIE:
                continue
            leftovers.append(" ".join(orphan.cmdline()))
            orphan.kill()
    return leftovers


@contextlib.contextmanager
def stock_hub() -> Iterator[Running]:
    """A JupyterHub as one gets it: its simple local spawner, the Python proxy, JupyterLab, ipykernel."""
    with scratch("stock-hub-") as directory:
        token = secrets.token_hex(16)
        url = f"http://127.0.0.1:{free_port()}"
        config = STOCK_CONFIG.format(
            url=url, hub_port=free_port(), home=str(directory / "home"), token=token, python=sys.executable,
            proxy_port=free_port(), proxy_token=secrets.token_hex(16),
        )  # fmt: skip
        (directory / "jupyterhub_config.py").write_text(config)
        began = time.perf_counter()
        process = start([sys.executable, "-m", "jupyterhub", "-f", "jupyterhub_config.py"], directory)
        running = Running("stock JupyterHub", Hub(url, token), directory, process, PLAIN_KERNEL)
        yield from _while_running(running, began)


@contextlib.contextmanager
def nbos_hub(state_dir: Path | None = None, options: Sequence[str] = ()) -> Iterator[Running]:
    """`nbos up` in a state directory of its own, or in the one given (which is kept)."""
    with contextlib.ExitStack() as stack:
        directory = state_dir or stack.enter_context(scratch("nbos-"))
        url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "nbos.cli", "up", "--state-dir", str(directory), "--port", str(port)]
        began = time.perf_counter()
        process = start([*command, *options], directory)
        running = Running("NBOS", Hub(url, ""), directory, process, DISPLAY_NAME)
        yield from _while_running(running, began)


def _while_running(running: Running, began: float) -> Iterator[Running]:
    try:
        asyncio.run(_login_page(running))
        running.ready_after = time.perf_counter() - began
        if not running.hub.token:
            running.hub = entered(running.directory)
        asyncio.run(running.hub.ready())
        yield running
    except BaseException:
        print(f"--- the end of the log of {running.name}\n{running.tail()}\n---", file=sys.stderr)
        raise
    finally:
        for command in stop(running.process):
            print(f"{running.name} left behind: {command}", file=sys.stderr)


async def _login_page(running: Running, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while True:
        if running.process.poll() is not None:
            raise RuntimeError(f"{running.name} ended with exit code {running.process.returncode}")
        with contextlib.suppress(OSError):
            page = await AsyncHTTPClient().fetch(f"{running.hub.url}/hub/login", raise_error=False)
            if page.code == 200:
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{running.name}: no login page within {timeout:g} s")
        await asyncio.sleep(0.05)
