"""Replicas as local processes, each in a session and process group of its own.

They outlive a crashed daemon; a restarted one finds them by pid *and* start time, so a reused pid is never taken for
one. Ends are seen through pidfds: no signal handler, no polling. The environment is made anew from a short list, so
that no secret of the daemon reaches user code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from gpu_daemon.rundir import read_json, write_json
from gpu_daemon.runtime import Exit, Handle, Launch, ReplicaRuntime, RuntimeFailed
from gpu_daemon.site import log
from gpu_daemon.warm_pool import WarmPool
from gpu_daemon.warm_process import Spare
from nbos_cluster.records import WarmRecord

PASSED_ON = frozenset({"PATH", "HOME", "LANG", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH"})
PASSED_ON_PREFIXES = ("LC_", "PYTHON")
LOG_LIMIT = 16 * 1024 * 1024
"""Bytes: a replica's log that is longer is begun anew at the next start."""

TOLD_WITHIN = 2.0
"""Seconds in which a warm parent says how a replica ended."""

_PAGE = os.sysconf("SC_PAGE_SIZE")


def clean_environment(environ: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """What a replica may see of the daemon's environment, plus what its kernel's record says."""
    kept = {k: v for k, v in environ.items() if k in PASSED_ON or k.startswith(PASSED_ON_PREFIXES)}
    return {**kept, **extra}


class ProcessHandle(Handle):
    """A process by pidfd. child: whether this daemon started it, so that its exit status can be read; ended: gives that
    of one which a warm parent forked (and reaps), None when that is gone as well. uncounted: bytes of memory that are
    not its kernel's doing: modules imported ahead."""

    def __init__(
        self, pid: int, child: bool, ended: asyncio.Future[int | None] | None = None, uncounted: int = 0
    ) -> None:
        self.pid, self._uncounted = pid, uncounted
        self._child, self._ended = child, ended
        self._exit: Exit | None = None
        self._pidfd = os.pidfd_open(pid)

    async def wait(self) -> Exit:
        if self._exit is None:
            loop = asyncio.get_running_loop()
            gone: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self._pidfd, _settle, gone)
            try:
                await gone
            finally:
                loop.remove_reader(self._pidfd)
            self._exit = self._reap() if self._ended is None else await self._told(self._ended)
        return self._exit

    def kill(self) -> None:
        if self._exit is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            # Should user code have left its group (setsid), the replica itself still goes.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def owns(self, pid: int) -> bool:
        # The replica itself, not what user code started: that runs under the same user and could open the socket.
        return pid == self.pid

    def forget(self) -> None:
        """Look at this process no more; it goes on."""
        os.close(self._pidfd)

    def memory(self) -> int:
        try:
            resident = int(Path(f"/proc/{self.pid}/statm").read_bytes().split()[1]) * _PAGE
            return max(0, resident - self._uncounted)
        except (OSError, IndexError):
            return 0

    async def _told(self, ended: asyncio.Future[int | None]) -> Exit:
        """As the warm parent says, which reaps it, and has ended what it left running before."""
        await asyncio.wait({ended}, timeout=TOLD_WITHIN)
        if not ended.done() or (code := ended.result()) is None:
            self._reap()
            return Exit(detail="ended (how is not known: the warm parent that it was forked from is gone)")
        os.close(self._pidfd)
        return _exit_of(code)

    def _reap(self) -> Exit:
        # What the replica left running goes with it. Before waitpid: until then its pid, and so its group, is its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        result = Exit()
        if self._child:
            with contextlib.suppress(ChildProcessError):
                result = _exit_of(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]))
        os.close(self._pidfd)
        return result


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _exit_of(code: int) -> Exit:
    return Exit(code=code) if code >= 0 else Exit(signal=-code)


class ProcessRuntime(ReplicaRuntime):
    """pool: replicas that were started ahead, None to start each afresh."""

    def __init__(self, pool: WarmPool | None = None) -> None:
        self._pool = pool

    async def open(self) -> None:
        if self._pool is not None:
            self._pool.changed = lambda: self.changed()
            await self._pool.open()

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()

    def warm(self) -> tuple[WarmRecord, ...]:
        return (self._pool.record(),) if self._pool is not None else ()

    def imported(self, kernel: str, owner: str, modules: tuple[str, ...]) -> None:
        if self._pool is not None:
            self._pool.imported(kernel, owner, modules)

    async def start(self, launch: Launch) -> ProcessHandle:
        env = clean_environment(os.environ, launch.env)
        spare = await self._pool.take(env, launch.cwd or str(launch.folder)) if self._pool is not None else None
        try:
            if spare is not None and (handle := await _use(launch, env, spare)):
                return handle
            return await asyncio.to_thread(_spawn, launch, env)
        except OSError as err:
            raise RuntimeFailed(f"its process could not be started in {launch.cwd or launch.folder}: {err}") from err

    async def find(self, folder: Path) -> ProcessHandle | None:
        saved = read_json(folder / "process.json") or {}
        pid = saved.get("pid")
        if not isinstance(pid, int):
            return None
        try:
            handle = ProcessHandle(pid, child=False, uncounted=int(saved.get("uncounted", 0)))
        except (OSError, OverflowError):
            return None
        # Checked after the pidfd is open: from then on the pid cannot become another process's unseen.
        if _start_time(pid) != saved.get("start"):
            handle.forget()
            return None
        return handle


def _folder(launch: Launch) -> str:
    """Where it starts."""
    cwd = launch.cwd or str(launch.folder)
    if Path(cwd).is_dir():
        return cwd
    # A folder that was deleted must not make the kernel unusable.
    log.warning("kernel %s: its folder %s is not there, it starts in the home folder", launch.kernel, cwd)
    return str(Path.home())


def _argv(launch: Launch) -> tuple[str, ...]:
    """Its command line; the connection file is written."""
    connection = launch.folder / "connection.json"
    write_json(connection, launch.connection_file(launch.ip))
    return launch.argv(sys.executable, str(launch.folder / "s"), str(connection))


def _output(launch: Launch) -> IO[bytes]:
    path = launch.folder / "log"
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT:
            path.unlink()
    return open(path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600))


def _note(launch: Launch, pid: int, uncounted: int = 0) -> None:
    """So that a restarted daemon finds it again."""
    write_json(launch.folder / "process.json", {"pid": pid, "start": _start_time(pid), "uncounted": uncounted})


async def _use(launch: Launch, env: Mapping[str, str], spare: Spare) -> ProcessHandle | None:
    """The replica that `spare` has become; None when it ended before."""
    try:
        return await asyncio.to_thread(_assign, launch, env, spare)
    except ConnectionError:
        log.warning("kernel %s: spare %d ended just now; its replica starts afresh", launch.kernel, spare.pid)
        await spare.discard()
        return None
    except OSError:
        await spare.discard()
        raise


def _assign(launch: Launch, env: Mapping[str, str], spare: Spare) -> ProcessHandle:
    """Raises ConnectionError when the spare is gone."""
    argv, cwd = _argv(launch), _folder(launch)
    try:
        handle = ProcessHandle(spare.pid, spare.ended is None, spare.ended, spare.resident)
    except ProcessLookupError as err:
        raise ConnectionResetError("it was reaped") from err
    try:
        # After the pidfd is open: while the spare's socket is, the pid is the spare's.
        if not spare.alive():
            raise ConnectionResetError("it ended")
        # Before it is told: a daemon that dies in between leaves a spare without a daemon, which ends.
        _note(launch, spare.pid, spare.resident)
        with _output(launch) as output:
            spare.assign(argv, env, cwd, output.fileno())
    except BaseException:
        handle.forget()
        raise
    return handle


def _spawn(launch: Launch, env: Mapping[str, str]) -> ProcessHandle:
    argv, cwd = _argv(launch), _folder(launch)
    with _output(launch) as output:
        process = subprocess.Popen(
            list(argv),
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    # At once: a daemon that dies here must find it again.
    _note(launch, process.pid)
    # We wait through the pidfd; Popen must neither wait nor warn.
    process.returncode = 0
    # When memory runs out, the replica goes before the daemon that would start it again.
    with contextlib.suppress(OSError):
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("500")
    return ProcessHandle(process.pid, child=True)


def _start_time(pid: int) -> int | None:
    """Clock ticks after boot at which the process started; None when it is gone or only its zombie is left."""
    try:
        # The name (field 2) may hold spaces and brackets: count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
