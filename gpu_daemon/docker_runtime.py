"""Replicas in Docker, one container each.

They outlive the daemon; a restarted one finds them by name and labels, and removes what it does not find a use for.
Ends are heard from the Engine's events, out-of-memory kills told apart. A container that ended is removed once its exit
and the end of its output (kept in the replica's log) were read. What a container is made of: `container_spec`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from docker.errors import APIError, NotFound

from gpu_daemon import container_check
from gpu_daemon.container_end import KILLED, failed_start, memory_end, plain_end, told_end
from gpu_daemon.container_spec import LABEL, DockerOptions, Site, container
from gpu_daemon.docker_engine import Engine, Trouble, no_image, words
from gpu_daemon.docker_network import make_network, remove_network
from gpu_daemon.lineage import Kin
from gpu_daemon.rundir import write
from gpu_daemon.runtime import Exit, Handle, Launch, ReplicaRuntime, RuntimeFailed
from gpu_daemon.site import log
from nbos_cluster.records import Device

PATIENCE = 30.0
"""Seconds that the Engine has to answer when the daemon starts."""
NAME_FREE_WITHIN = 10.0
"""Seconds that the container before has to be gone."""
TAIL = 200
"""Lines of a container's output that are kept."""
LOG_LIMIT = 4 * 1024 * 1024


class ContainerHandle(Handle):
    """A container; `pid` is its first process (an init, whose one child is the replica)."""

    def __init__(self, runtime: DockerRuntime, container: str, folder: Path, image: str) -> None:
        self.pid, self.container = 0, container
        self.folder, self.image = folder, image
        self.killed = False
        self.over = asyncio.Event()
        """Set when the Engine said that it ended."""
        self.code: int | None = None
        """Its exit status, when the Engine said that as well."""
        self.limited = False
        """Whether its memory has a bound, so that SIGKILL may be the system's."""
        self._runtime = runtime
        self._exit: Exit | None = None

    async def wait(self) -> Exit:
        if self._exit is None:
            await self.over.wait()
            self._exit = await self._runtime.exit_of(self)
        return self._exit

    def kill(self) -> None:
        if self._exit is None:
            self.killed = True
            self._runtime.engine.begin(lambda api: api.kill(self.container, "SIGKILL"))

    def owns(self, pid: int) -> bool:
        # 0: in a pid namespace that this daemon does not see into (it is in a container, too). Only that container has
        # the socket. Where the pid can be seen: the replica itself, not what user code forked.
        return pid in (0, self.pid) or _parent(pid) == self.pid

    def holds(self, process: Kin) -> bool:
        # Also what somebody started in the container from outside.
        return super().holds(process) or (bool(self.container) and self.container in process.group)

    def memory(self) -> int:
        return 0  # the container's cgroup keeps the limit


class DockerRuntime(ReplicaRuntime):
    """devices: of this host; real ones are given to every container."""

    socket_mode = 0o666
    """Whatever user the container has. Nobody else can reach it: the folders above are the daemon's alone (0700)."""

    def __init__(self, options: DockerOptions, site: Site, devices: Sequence[Device], etcd: Sequence[str] = ()) -> None:
        self._options, self._site, self._devices, self._etcd = options, site, devices, tuple(etcd)
        self.engine = Engine(options.engine)
        self._handles: dict[str, ContainerHandle] = {}
        self._network = options.network
        self._fencing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self.engine.connect(PATIENCE)
        self._network = await make_network(self.engine, self._options, self._site, self._etcd)
        self.engine.listen(self._site.labels, self._died, self._look_again)
        log.info("replicas run in Docker %s, on the network %s", self.engine.version, self._network)

    async def close(self) -> None:
        # What was begun (containers being removed) first.
        await asyncio.to_thread(self.engine.finish)
        if not self._handles:
            await remove_network(self.engine, self._options, self._site)
        await asyncio.to_thread(self.engine.close)

    def socket(self, folder: Path) -> Path:
        own = folder / "d"
        own.mkdir(exist_ok=True)
        own.chmod(0o755)
        return own / "s"

    # -- starting and finding -----------------------------------------------------------------------------------------

    async def start(self, launch: Launch) -> ContainerHandle:
        image = launch.image or self._options.image
        await self._get_image(image, launch)
        try:
            _prepare(launch)
            user = self._user(launch.owner)
            body = container(launch, self._options, self._site, user, self._network, self._devices)
            name = self._site.name(launch.folder.name)
            handle = ContainerHandle(self, await self._create(body, name), launch.folder, image)
        except Trouble as err:
            raise RuntimeFailed(failed_start(words(err), image)) from err
        # Before it runs: an end that comes at once must find it.
        self._handles[handle.container] = handle
        try:
            await self.engine.call(lambda api: api.start(handle.container))
            found = await self.engine.call(lambda api: api.inspect_container(handle.container))
        except Trouble as err:
            self._handles.pop(handle.container, None)
            self._remove(handle.container)
            raise RuntimeFailed(failed_start(words(err), image)) from err
        _note(handle, found)
        return handle

    async def _create(self, body: dict[str, Any], name: str) -> str:
        def create(api: Any) -> str:
            deadline = time.monotonic() + NAME_FREE_WITHIN
            while True:
                try:
                    return str(api.create_container_from_config(body, name)["Id"])
                except APIError as err:
                    if err.status_code != 409 or time.monotonic() > deadline:
                        raise
                # One of before, which ended: the daemon starts a replica only when none runs in its folder. Its removal
                # may be under way; the Engine then says 409 as well, or 404 when it is just over.
                with contextlib.suppress(APIError):
                    api.remove_container(name, force=True)
                time.sleep(0.02)

        return await self.engine.call(create)

    async def _get_image(self, image: str, launch: Launch) -> None:
        policy = self._options.pull
        try:
            there = await self.engine.has_image(image)
        except Trouble as err:
            raise RuntimeFailed(f"the Docker Engine does not answer: {words(err)}; look at its log") from err
        if policy == "never" and not there:
            raise RuntimeFailed(no_image(image, "this host pulls no images"))
        if policy == "always" or not there:
            try:
                await self.engine.pull(image, launch.tell)
            except RuntimeFailed as err:
                if not there:
                    raise
                log.warning("%s; the one that is there is used", err)

    def _user(self, owner: str) -> str:
        if self._options.user != "owner":
            return self._options.user
        try:
            entry = pwd.getpwnam(owner)
        except KeyError:
            raise RuntimeFailed(
                f"this host knows no Unix user {owner!r}, and the option Docker.user says that replicas run as their "
                "owner; add the user here (or to the directory service), or set Docker.user to fixed ids"
            ) from None
        return f"{entry.pw_uid}:{entry.pw_gid}"

    async def find(self, folder: Path) -> ContainerHandle | None:
        try:
            found = await self.engine.call(lambda api: api.inspect_container(self._site.name(folder.name)))
        except NotFound:
            return None
        labels = found["Config"]["Labels"] or {}
        if not found["State"]["Running"] or labels.get(f"{LABEL}run-dir") != self._site.run_dir:
            return None
        handle = ContainerHandle(self, found["Id"], folder, found["Config"]["Image"])
        _note(handle, found)
        self._handles[handle.container] = handle
        # It may have ended between the two.
        self._look_at(handle)
        return handle

    async def clear(self, kept: Collection[Path]) -> None:
        filters = {"label": [f"{k}={v}" for k, v in self._site.labels.items()]}
        for found in await self.engine.call(lambda api: api.containers(all=True, filters=filters)):
            if found["Id"] not in self._handles:
                log.warning("container %s is of no kernel any more; it is removed", found["Names"][0].lstrip("/"))
                self._remove(found["Id"])

    async def _fence_again(self) -> None:
        try:
            await make_network(self.engine, self._options, self._site, self._etcd)
        except RuntimeFailed as err:
            log.error("%s", err)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _died(self, container: str, code: int) -> None:
        handle = self._handles.get(container)
        if handle is not None:
            handle.code = code
            handle.over.set()

    def _look_again(self) -> None:
        """The Engine was away, or is heard for the first time: ask what became of each container, and set up anew what
        goes with a restart of the machine's firewall."""
        self._fencing = asyncio.create_task(self._fence_again(), name="the walls around replicas")
        for handle in self._handles.values():
            self._look_at(handle)
            if handle.killed:
                handle.kill()

    def _look_at(self, handle: ContainerHandle) -> None:
        loop = asyncio.get_running_loop()

        def look(api: Any) -> None:
            try:
                state = api.inspect_container(handle.container)["State"]
                # `created`: the start is on its way.
                ended = not state["Running"] and state["Status"] != "created"
            except NotFound:
                ended = True
            if ended:
                loop.call_soon_threadsafe(handle.over.set)

        self.engine.begin(look)

    async def exit_of(self, handle: ContainerHandle) -> Exit:
        """How it ended; what is left of it is removed, in the background.

        For a third of a second after an end the Engine answers no question about the container: what the event told
        is enough for most ends.
        """
        exit = None
        if handle.code is not None and (handle.code != KILLED or handle.killed or not handle.limited):
            exit = plain_end(handle.code)
        if exit is None:
            try:
                exit = await self.engine.call(lambda api: _read_exit(api, handle))
            except Trouble as err:
                log.warning("how container %s ended cannot be read: %s", handle.container[:12], words(err))
                exit = Exit()
        self._handles.pop(handle.container, None)
        self.engine.begin(lambda api: _bury(api, handle))
        return exit

    def _remove(self, container: str) -> None:
        self.engine.begin(lambda api: api.remove_container(container, v=True, force=True))


def _prepare(launch: Launch) -> None:
    """What the container sees of the replica's folder. Any user of it may read that; nobody else gets there."""
    own = launch.folder / "d"
    # Every address of its own network namespace: the Engine passes on what comes to the published one.
    write(own / "connection.json", json.dumps(launch.connection_file("0.0.0.0")).encode())
    shutil.copyfile(container_check.__file__, own / "start.py")
    for name in ("connection.json", "start.py"):
        (own / name).chmod(0o644)


def _note(handle: ContainerHandle, found: Mapping[str, Any]) -> None:
    """What is needed of the Engine's description while it runs."""
    handle.pid = int(found["State"]["Pid"])
    handle.limited = bool(found["HostConfig"]["Memory"])


def _read_exit(api: Any, handle: ContainerHandle) -> Exit:
    """By all that the Engine can tell."""
    found = api.inspect_container(handle.container)
    code = int(found["State"]["ExitCode"])
    return memory_end(found) or plain_end(code) or told_end(code, _output(api, handle), handle.image)


def _output(api: Any, handle: ContainerHandle) -> list[str]:
    lines: list[str] = api.logs(handle.container, tail=TAIL).decode(errors="replace").splitlines()
    return lines


def _bury(api: Any, handle: ContainerHandle) -> None:
    """Keep the end of its output, and remove it."""
    try:
        _keep(handle.folder / "log", _output(api, handle))
    except FileNotFoundError:
        log.debug("the replica of container %s is forgotten already, with its log", handle.container[:12])
    except OSError as err:
        log.warning("the log of container %s cannot be kept: %s", handle.container[:12], err)
    api.remove_container(handle.container, v=True, force=True)


def _keep(path: Path, lines: list[str]) -> None:
    """The end of the container's output, for who looks for the reason later."""
    mode = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if path.exists() and path.stat().st_size > LOG_LIMIT else os.O_APPEND)
    with open(os.open(path, mode, 0o600), "w", errors="replace") as file:
        file.write("".join(f"{line}\n" for line in lines))


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return -1
