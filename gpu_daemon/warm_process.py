"""The daemon's side of `nbos_kernel.warm`: the warm parent, and the spares that wait for a replica to be.

Guarantees: a spare that this daemon knows by pid is that process (a pidfd was open before its socket proved it alive);
one whose start was not answered in time can never become a second replica, since its socket is closed; how a forked
replica ended is told by the parent that reaped it, and is not known once that parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_daemon.site import log

LONGEST = 64 * 1024
READY_WITHIN = 120.0
"""Seconds that the imports may take: large modules, a cold disk."""
FORK_WITHIN = 3.0
ROOM = "." * 512
"""As `nbos_kernel.warm.title` wants it: room for the command line that is shown later."""


class NotWarm(RuntimeError):
    """No spare can be had: says why."""


@dataclass(frozen=True)
class Ready:
    """What a process said when its imports were done; see `nbos_kernel.warm.imports.Imported`. below: beginnings of
    names in the environment that the interpreter, the loader or native libraries read when they are loaded."""

    reads: frozenset[str] = frozenset()
    below: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    unsafe: str = ""
    culprit: str = ""
    resident: int = 0
    tops: frozenset[str] = frozenset()
    private: int = 0
    """Bytes that it shares with nobody; told by spares in containers."""


@dataclass
class Spare:
    """A process that waits. resident: bytes of the modules that were imported ahead, which no limit counts. ended:
    gives its exit code (negative: a signal), or None when nobody can tell; a child of this daemon, which the daemon
    reaps itself, has none."""

    pid: int
    socket: socket.socket
    resident: int = 0
    ended: asyncio.Future[int | None] | None = None

    def alive(self) -> bool:
        return waits(self.socket)

    def assign(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, output: int) -> None:
        """It becomes a replica, with its output to the descriptor `output`. Raises OSError when it is gone."""
        hand_over(self.socket, {"argv": list(argv), "env": dict(env), "cwd": cwd}, output)

    async def discard(self) -> None:
        """It reads the end of its socket, and ends; or it has ended."""
        self.socket.close()
        if self.ended is None:
            # Not reaped yet, so that the pid is its own. A module's threads could keep it.
            os.kill(self.pid, signal.SIGKILL)
            await asyncio.to_thread(os.waitpid, self.pid, 0)


def waits(own: socket.socket) -> bool:
    """A spare that ended has closed its end; one that waits says nothing."""
    try:
        return bool(own.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def hand_over(own: socket.socket, assignment: Mapping[str, object], *output: int) -> None:
    """Tell the spare at the other end what to be, and close this one. Raises OSError when it is gone."""
    file = os.memfd_create("assignment", os.MFD_CLOEXEC)
    try:
        os.write(file, json.dumps(assignment).encode())
        socket.send_fds(own, [b"start"], [*output, file])
    finally:
        os.close(file)
        own.close()


def environment_reads(ready: Ready, base: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Names whose values a fresh process would have read while it started, and that differ from those of the process
    that was warmed: such a replica must be started afresh."""
    differ = {name for name in {*base, *wanted} if base.get(name) != wanted.get(name)}
    return sorted(name for name in differ if name in ready.reads or name.startswith(ready.below))


class WarmParent:
    """One `python -m nbos_kernel.warm`. folder: where its own output goes. gently: it leaves half of its core to
    others while it imports. Not started until `start`."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str], folder: Path, gently: bool = False) -> None:
        self._modules, self._env, self._folder, self._gently = tuple(modules), env, folder, gently
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._listener: asyncio.Task[None] | None = None
        self._asked: dict[int, asyncio.Future[tuple[int, asyncio.Future[int | None]]]] = {}
        self._children: dict[int, asyncio.Future[int | None]] = {}
        self._numbers = 0
        self.ready = Ready()

    @property
    def alive(self) -> bool:
        return self._listener is not None and not self._listener.done()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def idle(self) -> bool:
        """Whether it has no children, spares or replicas."""
        return not self._children

    async def start(self) -> None:
        """Until it can fork, or has said that it must not (`ready.unsafe`; it has ended then). Raises NotWarm."""
        way = ["--gently"] if self._gently else []
        self._process, control = await asyncio.to_thread(launch, way, self._modules, self._env, self._folder)
        self._control = control
        try:
            self.ready = await _said_ready(control, self._folder, READY_WITHIN * (1 + 2 * self._gently))
        except BaseException:
            self.kill()
            await self.close()
            raise
        if self.ready.unsafe:
            await self.close()
            return
        self._listener = asyncio.create_task(self._listen(control), name="the warm parent")

    async def fork(self) -> Spare:
        """A new spare. Raises NotWarm; a parent that does not answer is ended."""
        if self._control is None or not self.alive:
            raise NotWarm("the warm parent is gone")
        self._numbers += 1
        number, loop = self._numbers, asyncio.get_running_loop()
        self._asked[number] = loop.create_future()
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                socket.send_fds(self._control, [json.dumps({"type": "fork", "id": number}).encode()], [theirs.fileno()])
            async with asyncio.timeout(FORK_WITHIN):
                pid, ended = await self._asked[number]
        except (OSError, TimeoutError) as err:
            own.close()
            self.kill()
            raise NotWarm(f"the warm parent does not fork: {err or 'no answer'}") from err
        except BaseException:
            own.close()
            raise
        finally:
            self._asked.pop(number, None)
        return Spare(pid, own, self.ready.resident, ended)

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        """It ends; spares and replicas that it forked do not."""
        if self._control is not None:
            # The listener reads the end of it.
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
        if self._listener is not None:
            await asyncio.wait({self._listener})
        elif self._process is not None:
            await reap(self._process)
        if self._control is not None:
            self._control.close()
            self._control = None

    async def _listen(self, control: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        control.setblocking(False)
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(control, LONGEST):
                self._heard(json.loads(data))
        assert self._process is not None
        for child in self._children.values():
            child.set_result(None)
        self._children.clear()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(ConnectionResetError("it ended"))
        await reap(self._process)

    def _heard(self, message: dict[str, Any]) -> None:
        match message:
            case {"type": "forked", "id": number, "pid": pid}:
                self._children[pid] = asyncio.get_running_loop().create_future()
                asked = self._asked.get(number)
                if asked is not None and not asked.done():
                    asked.set_result((pid, self._children[pid]))
            case {"type": "ended", "pid": pid, "code": code} if pid in self._children:
                self._children.pop(pid).set_result(code)


async def start_alone(modules: Sequence[str], env: Mapping[str, str], folder: Path) -> tuple[Spare, Ready]:
    """A spare that no parent forked: it imported by itself. Raises NotWarm."""
    process, own = await asyncio.to_thread(launch, ["--spare"], modules, env, folder)
    try:
        ready = await _said_ready(own, folder, READY_WITHIN)
    except BaseException:
        own.close()
        process.kill()
        await reap(process)
        raise
    # From now on it is reaped through its pidfd, like a replica.
    process.returncode = 0
    return Spare(process.pid, own, ready.resident), ready


def launch(
    options: Sequence[str], modules: Sequence[str], env: Mapping[str, str], folder: Path
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (empty := folder / "empty").mkdir(mode=0o700, exist_ok=True)
    own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    opener = lambda path, flags: os.open(path, flags, 0o600)  # noqa: E731
    with theirs, open(folder / "log", "wb", opener=opener) as output:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "nbos_kernel.warm", *options, str(theirs.fileno()), *modules, ROOM],
                # Where `python -m` looks for modules first: nothing may be found there.
                cwd=empty,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as err:
            own.close()
            raise NotWarm(f"no process could be started: {err}") from err
    # As replicas have it, which inherit it: when memory runs out they go before the daemon.
    with contextlib.suppress(OSError):
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("500")
    return process, own


async def _said_ready(own: socket.socket, folder: Path, within: float) -> Ready:
    own.setblocking(False)
    try:
        async with asyncio.timeout(within):
            data = await asyncio.get_running_loop().sock_recv(own, LONGEST)
    except TimeoutError as err:
        raise NotWarm(f"its imports took more than {within:g} s; see {folder / 'log'}") from err
    except ConnectionError:
        data = b""
    if not data:
        raise NotWarm(f"it ended while it imported; see {folder / 'log'}")
    return read_ready(data)


def read_ready(data: bytes) -> Ready:
    told = json.loads(data)
    ready = Ready(
        reads=frozenset(told["reads"]),
        below=tuple(told.get("below", ("",))),
        failed=told["failed"],
        unsafe=told["unsafe"],
        culprit=told.get("culprit", ""),
        resident=told["resident"],
        tops=frozenset(told.get("tops", ())),
        private=int(told.get("private", 0)),
    )
    for name, reason in ready.failed.items():
        log.warning("module %s cannot be imported ahead: %s", name, reason)
    return ready


async def reap(process: subprocess.Popen[bytes]) -> None:
    try:
        await asyncio.to_thread(process.wait, 5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        await asyncio.to_thread(process.wait)
