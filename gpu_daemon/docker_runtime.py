"""Replicas in Docker, one container each.

They outlive the daemon; a restarted one finds them by name and labels, and removes what it does not find a use for.
Ends are heard from the Engine's events, out-of-memory kills told apart. A container that ended is removed once its exit
and the end of its output (kept in the replica's log) were read. What a container is made of: `container_spec`. A
replica that did not run before becomes one that waits (`container_pool`), where one does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from docker.errors import NotFound

from gpu_daemon.container_end import KILLED, failed_start, plain_end
from gpu_daemon.container_pool import ContainerPool, Spare
from gpu_daemon.container_spec import CONNECTION, INSIDE, LABEL, DockerOptions, Site, container, fill, ports_of
from gpu_daemon.containers import Containers, keep, named, output, put_check, read_exit
from gpu_daemon.docker_engine import Engine, Trouble, words
from gpu_daemon.docker_network import make_network, remove_network
from gpu_daemon.lineage import Kin
from gpu_daemon.rundir import write
from gpu_daemon.runtime import Exit, Handle, Launch, ReplicaRuntime, RuntimeFailed
from gpu_daemon.site import log
from gpu_daemon.warm_pool import WarmOptions
from nbos_cluster.records import Device, WarmRecord

PATIENCE = 30.0
"""Seconds that the Engine has to answer when the daemon starts."""


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
    """devices: of this host; real ones are given to every container. warm: which are started ahead; None: none. ip: at
    which ports are published."""

    socket_mode = 0o666
    """Whatever user the container has. Nobody else can reach it: the folders above are the daemon's alone (0700)."""

    def __init__(
        self,
        options: DockerOptions,
        site: Site,
        devices: Sequence[Device],
        etcd: Sequence[str] = (),
        warm: WarmOptions | None = None,
        ip: str = "127.0.0.1",
    ) -> None:
        self._options, self._site, self._devices, self._etcd = options, site, devices, tuple(etcd)
        self.engine = Engine(options.engine)
        self._containers = Containers(self.engine, options, site)
        self._pool: ContainerPool | None = None
        if warm is not None:
            self._pool = ContainerPool(warm, self._containers, devices, ip, Path(site.run_dir) / "w")
        self._handles: dict[str, ContainerHandle] = {}
        self._network = options.network
        self._fencing: asyncio.Task[None] | None = None

    @property
    def expects(self) -> bool:  # type: ignore[override]
        return self._pool is not None

    async def open(self) -> None:
        await self.engine.connect(PATIENCE)
        self._network = await make_network(self.engine, self._options, self._site, self._etcd)
        self.engine.listen(self._site.labels, self._died, self._look_again)
        log.info("replicas run in Docker %s, on the network %s", self.engine.version, self._network)

    async def close(self) -> None:
        if self._pool is not None:
            # While replicas go on, another daemon will come.
            await self._pool.close(leave=bool(self._handles))
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

    def warm(self) -> tuple[WarmRecord, ...]:
        return self._pool.records() if self._pool is not None else ()

    def expect(self, wanted: Sequence[tuple[str, str]]) -> None:
        if self._pool is not None:
            self._pool.expect(wanted)

    async def start(self, launch: Launch) -> ContainerHandle:
        image = launch.image or self._options.image
        image_id = await self._containers.image(image, launch.tell)
        # The ports of one that waits are its own; those of a replica that ran before are known to its router.
        if self._pool is not None and not launch.again:
            spare = self._pool.take(image, image_id, launch.owner, launch.env)
            if spare is not None and (handle := await self._use(launch, spare)):
                return handle
        return await self._start_afresh(launch, image)

    async def _use(self, launch: Launch, spare: Spare) -> ContainerHandle | None:
        """The replica that a waiting container has become; None when it could not.

        A daemon that dies on the way leaves a container that ends by itself (`Slot.take`), or has become the replica.
        """
        memory, name = launch.memory or self._options.memory, self._site.name(launch.folder.name)
        handle = ContainerHandle(self, spare.container, launch.folder, spare.kind.image)
        handle.pid, handle.ports, handle.limited = spare.pid, spare.ports, bool(memory)

        def take_over(api: Any) -> None:
            if launch.memory:
                api.update_container(spare.container, mem_limit=memory, memswap_limit=memory)
            named(api, name, lambda: api.rename(spare.container, name))

        # Before it is told: an end that comes at once must find it.
        self._handles[spare.container] = handle
        try:
            spare.slot.take()
            await self.engine.call(take_over)
            await asyncio.to_thread(spare.slot.move_to, launch.folder)
            spare.slot.assign(self._assignment(launch, spare))
        except (OSError, *Trouble) as err:
            log.warning(
                "kernel %s: container %s was not to be had: %s", launch.kernel, spare.container[:12], words(err)
            )
            self._handles.pop(spare.container, None)
            self._containers.remove(spare.container)
            spare.slot.remove()
            return None
        return handle

    def _assignment(self, launch: Launch, spare: Spare) -> dict[str, object]:
        return {
            "argv": launch.argv(self._options.python, f"{INSIDE}/s", CONNECTION),
            "env": dict(launch.env),
            "cwd": launch.cwd or fill(self._options.home, launch.owner),
            "connection": json.dumps(replace(launch, ports=spare.ports).connection_file("0.0.0.0")),
        }

    async def _start_afresh(self, launch: Launch, image: str) -> ContainerHandle:
        try:
            _prepare(launch)
            user = self._containers.user(launch.owner)
            body = container(launch, self._containers.usable(), self._site, user, self._network, self._devices)
            name = self._site.name(launch.folder.name)
            handle = ContainerHandle(self, await self._containers.create(body, name), launch.folder, image)
        except Trouble as err:
            raise RuntimeFailed(failed_start(words(err), image)) from err
        # Before it runs: an end that comes at once must find it.
        self._handles[handle.container] = handle
        try:
            await self.engine.call(lambda api: api.start(handle.container))
            found = await self.engine.call(lambda api: api.inspect_container(handle.container))
        except Trouble as err:
            self._handles.pop(handle.container, None)
            self._containers.remove(handle.container)
            raise RuntimeFailed(failed_start(words(err), image)) from err
        _note(handle, found)
        return handle

    async def find(self, folder: Path) -> ContainerHandle | None:
        try:
            found = await self.engine.call(lambda api: api.inspect_container(self._site.name(folder.name)))
        except NotFound:
            return None
        labels = found["Config"]["Labels"] or {}
        if not found["State"]["Running"] or labels.get(f"{LABEL}run-dir") != self._site.run_dir:
            return None
        handle = ContainerHandle(self, found["Id"], folder, found["Config"]["Image"])
        handle.ports = ports_of(labels)
        _note(handle, found)
        self._handles[handle.container] = handle
        # It may have ended between the two.
        self._look_at(handle)
        return handle

    async def clear(self, kept: Collection[Path]) -> None:
        filters = {"label": [f"{k}={v}" for k, v in self._site.labels.items()]}
        here = await self.engine.call(lambda api: api.containers(all=True, filters=filters))
        waiting: set[str] = set()
        if self._pool is not None:
            self._pool.network, self._pool.changed = self._network, lambda: self.changed()
            waiting = self._pool.open(here)
        for found in here:
            if found["Id"] not in self._handles and found["Id"] not in waiting:
                log.warning("container %s is of no kernel any more; it is removed", found["Names"][0].lstrip("/"))
                self._containers.remove(found["Id"])

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
        elif self._pool is not None:
            self._pool.died(container)

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
                exit = await self.engine.call(lambda api: read_exit(api, handle.container, handle.image))
            except Trouble as err:
                log.warning("how container %s ended cannot be read: %s", handle.container[:12], words(err))
                exit = Exit()
        self._handles.pop(handle.container, None)
        self.engine.begin(lambda api: _bury(api, handle))
        return exit


def _prepare(launch: Launch) -> None:
    """What the container sees of the replica's folder. Any user of it may read that; nobody else gets there."""
    own = launch.folder / "d"
    # Every address of its own network namespace: the Engine passes on what comes to the published one.
    write(own / "connection.json", json.dumps(launch.connection_file("0.0.0.0")).encode())
    (own / "connection.json").chmod(0o644)
    put_check(own)


def _note(handle: ContainerHandle, found: Mapping[str, Any]) -> None:
    """What is needed of the Engine's description while it runs."""
    handle.pid = int(found["State"]["Pid"])
    handle.limited = bool(found["HostConfig"]["Memory"])


def _bury(api: Any, handle: ContainerHandle) -> None:
    """Keep the end of its output, and remove it."""
    try:
        keep(handle.folder / "log", output(api, handle.container))
    except FileNotFoundError:
        log.debug("the replica of container %s is forgotten already, with its log", handle.container[:12])
    except OSError as err:
        log.warning("the log of container %s cannot be kept: %s", handle.container[:12], err)
    api.remove_container(handle.container, v=True, force=True)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return -1
