"""`nbos up`: bring everything up, keep it up, and take it all down.

Two processes: the outer one (the one you typed) holds the lock and waits; the inner one supervises. Each ends
what the other leaves behind, so that no process survives, whichever of them is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable

import psutil
from tornado.httpclient import AsyncHTTPClient, HTTPError

from gpu_daemon.inventory import look
from nbos_cluster import etcdauth, keys
from nbos_cluster.etcd import Etcd, EtcdError, EtcdUnavailable
from nbos_spawner.processes import adopt_orphans, die_with_parent

from .etcdserver import NoEtcd, find_etcd
from .layout import PORTS, Layout, UpOptions
from .places import drop_in_config
from .ports import PortInUse, check_public, keep_ports
from .state import StateDir, StateError, write_json
from .supervisor import Supervisor, end_descendants

START_LIMIT = 60.0
"""Seconds after which a start that does not come through is given up."""


class StartFailed(RuntimeError):
    """A part did not come up; says which, and what its log says last."""


def up(state: StateDir, options: UpOptions) -> int:
    """Run until Ctrl-C or SIGTERM; the exit status."""
    try:
        state.create()
        lock = state.lock()
        drop_in_config()
        end_strays(state)
        check_public(options.ip, options.port)
    except (StateError, PortInUse, FileNotFoundError) as err:
        print(f"nbos up: {err}", file=sys.stderr)
        return 1
    adopt_orphans()
    inner = os.fork()
    if inner == 0:
        status = 1
        try:
            die_with_parent()
            status = asyncio.run(_supervise(state, options))
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = _guard(inner)
    lock.close()
    return status


def _guard(inner: int) -> int:
    """The outer process: pass signals on, wait, and clear up after the inner one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _pass_on(inner))
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return 1
        if pid == inner:
            break
    end_descendants(10.0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _pass_on(inner: int) -> None:
    try:
        os.kill(inner, signal.SIGTERM)
    except ProcessLookupError:
        return


def end_strays(state: StateDir) -> None:
    """End what an earlier `nbos up` on this directory left (only when both its processes were killed at
    once).

    Replicas are left to the daemons, which find them again with their variables.
    """
    mark, mine = f"{state.path}", {p.pid for p in [psutil.Process(), *psutil.Process().parents()]}
    for process in psutil.process_iter():
        try:
            if process.pid in mine or process.uids().real != os.getuid():
                continue
            if process.environ().get("NBOS_STATE") != mark or "nbos_kernel" in process.cmdline():
                continue
            process.kill()
            print(f"ended process {process.pid} ({process.name()}), left by an earlier run")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


class Progress:
    """Prints what happens, with the seconds since the start."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.up = False

    def __call__(self, line: str) -> None:
        stamp = time.strftime("%H:%M:%S") if self.up else f"{time.monotonic() - self.began:6.1f} s"
        print(f"[{stamp}] {line}", flush=True)


async def _supervise(state: StateDir, options: UpOptions) -> int:
    """The inner process."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    say = Progress()
    supervisor = Supervisor(say)
    supervisor.begin()
    status = 0
    try:
        layout = _plan(state, options, say)
        starting = asyncio.ensure_future(_start(layout, supervisor, say))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await stopping
        else:
            starting.cancel()
    except (StartFailed, NoEtcd, StateError) as err:
        print(f"nbos up: {err}", file=sys.stderr, flush=True)
        status = 1
    await _stop(supervisor, options, say)
    return status


def _plan(state: StateDir, options: UpOptions, say: Callable[[str], None]) -> Layout:
    """Look at the machine and write every file the processes need."""
    etcd = find_etcd()
    if etcd.warning:
        say(f"warning: {etcd.warning}")
    found = look()
    real = () if options.simulate else found.devices
    ports = keep_ports(state.path / "ports.json", PORTS)
    layout = Layout(state, options, ports, etcd, real)
    layout.make_certificates()
    layout.write_settings()
    write_json(state.info_file, layout.info(os.getpid()))
    say(f"state in {state.path}, logs in {state.logs}")
    if real:
        say(f"{len(real)} NVIDIA GPU(s) found, dealt out to {options.hosts} hosts")
    else:
        say(f"GPUs are simulated: {options.gpus} on each of {options.hosts} hosts (NVML: {found.state.value})")
    return layout


async def _start(layout: Layout, supervisor: Supervisor, say: Progress) -> None:
    """Start everything in order, each as soon as what it needs is there."""
    children = layout.children()
    deadline = time.monotonic() + START_LIMIT
    supervisor.start(children["etcd"])
    supervisor.start(children["proxy"])
    supervisor.start(children["hub"])  # imports take seconds; it needs etcd only through the gateway
    async with Etcd(layout.endpoints, layout.tls("up"), timeout=1.0) as etcd:
        await _until(supervisor, "etcd", lambda: _etcd_up(etcd), deadline)
        await _guard_etcd(layout)
        say(f"etcd {layout.etcd.text} is up on 127.0.0.1:{layout.ports['etcd']}, with TLS and a user per process")
        for host in layout.hosts:
            supervisor.start(children[host])
        for host in layout.hosts:
            await _until(supervisor, host, lambda host=host: _host_up(etcd, host), deadline)  # type: ignore[misc]
            say(f"{host} is up (gpu_daemon, process {children[host].pid})")
    await _until(supervisor, "hub", lambda: _answers(f"{layout.url}/hub/login"), deadline)
    say(f"JupyterHub is up behind its proxy on port {layout.options.port}")
    await _until(supervisor, "hub", lambda: _answers(f"{layout.url}/services/nbos/api/health"), deadline)
    say("the gateway is up")
    say.up = True
    print(_welcome(layout), flush=True)


async def _guard_etcd(layout: Layout) -> None:
    """Give each process its user in etcd. A slow disk may take its time with it: nothing can start before."""
    async with Etcd(layout.endpoints, layout.tls("up"), timeout=15.0) as etcd:
        try:
            await etcdauth.setup(etcd, layout.hosts)
        except (EtcdError, EtcdUnavailable) as err:
            raise StartFailed(f"etcd's users and roles cannot be set up: {err}") from err


def _welcome(layout: Layout) -> str:
    state = layout.state
    return f"""
NBOS is ready: {layout.url}/

  log in with any user name and the password  {state.password_file.read_text().strip()}
  administrator: {layout.options.admin}, password  {state.admin_password_file.read_text().strip()}
  (kept in {state.password_file} and {state.admin_password_file}, readable by you alone)
  dashboard: {layout.url}/services/nbos/     status: nbos status     end: Ctrl-C
"""


async def _until(supervisor: Supervisor, name: str, ready: Callable[[], Awaitable[bool]], deadline: float) -> None:
    """Wait until `ready` says so. Raises StartFailed when its process keeps dying, or at the deadline."""
    child = supervisor.children[name]
    deaths = 0
    while not await ready():
        if child.ended is not None and child.backoff.pause > 1.0:
            deaths = 3
        if deaths or time.monotonic() > deadline:
            why = "keeps ending" if deaths else f"did not come up within {START_LIMIT:.0f} s"
            raise StartFailed(f"{child.label} {why}; the end of {child.log}:\n{child.last_words()}")
        await asyncio.sleep(0.15)


async def _etcd_up(etcd: Etcd) -> bool:
    try:
        await etcd.status()
    except EtcdUnavailable:
        return False
    return True


async def _host_up(etcd: Etcd, host: str) -> bool:
    try:
        return await etcd.get(keys.host(host)) is not None
    except EtcdUnavailable:
        return False


async def _answers(url: str) -> bool:
    try:
        reply = await AsyncHTTPClient().fetch(url, request_timeout=5, raise_error=False, follow_redirects=False)
    except (OSError, HTTPError):
        return False
    return reply.code < 400


async def _stop(supervisor: Supervisor, options: UpOptions, say: Progress) -> None:
    """End everything in the order that loses nothing: who starts processes first, etcd last."""
    began = time.monotonic()
    say("stopping: JupyterHub and its gateway")
    await supervisor.end(["hub"], 8.0)
    say("stopping: the hosts, with their replicas")
    await supervisor.end([f"host-{i}" for i in range(1, options.hosts + 1)], 10.0)
    say("stopping: users' servers and the proxy")
    await supervisor.end_others(["etcd"], 6.0)
    await supervisor.end(["etcd"], 5.0)
    await supervisor.end_others([], 1.0)
    say(f"everything has ended, in {time.monotonic() - began:.1f} s; start again with `nbos up`, kernels come back")
