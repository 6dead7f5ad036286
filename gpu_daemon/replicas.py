"""Carrying out what the fleet decides: processes started, watched and ended, sockets opened, records written.

Guarantees: whatever ends a replica, its claim and grant end with it, with a reason; a replica that could not be started
is reported with the reason and tried again; all replicas are gone when `stop_all` returns.
"""

from __future__ import annotations

import asyncio
import contextlib

from gpu_daemon import fleet
from gpu_daemon.commits import Commits
from gpu_daemon.fleet import Fleet, ReplicaId
from gpu_daemon.ports import bindable, free_ports, numbers
from gpu_daemon.publishing import Publisher, placed_here
from gpu_daemon.replica import EXIT_GRACE, LocalReplica
from gpu_daemon.runtime import Handle, Launch, ReplicaRuntime, RuntimeFailed
from gpu_daemon.sessions import Answer, Session, listen
from gpu_daemon.site import Site, log
from nbos_cluster import keys
from nbos_cluster.kernelview import KernelView
from nbos_cluster.records import KernelSpec, Ports, ReplicaRecord

MEMORY_EVERY = 0.5
REACH_AGAIN = 1.0
GIB = 1 << 30


class Replicas:
    def __init__(self, site: Site, runtime: ReplicaRuntime, commits: Commits, publisher: Publisher) -> None:
        self._site, self._runtime, self._commits, self._publisher = site, runtime, commits, publisher
        self._fleet = Fleet()
        self._timer: asyncio.TimerHandle | None = None
        self._refused: set[ReplicaId] = set()
        """Wanted here, but beyond what this host takes."""
        self._starting: set[asyncio.Task[None]] = set()
        self._memory_watch: asyncio.Task[None] | None = None
        self.answer: Answer | None = None

    # -- what should be -----------------------------------------------------------------------------------------------

    def kernel_changed(self, kernel: str, view: KernelView | None) -> None:
        """The records of a kernel are as in `view`; None: it is gone."""
        spec = view.spec if view is not None else None
        indexes = self._placed(spec)
        if spec is not None:
            indexes -= self._no_room(spec, indexes)
        self._forget_refused(kernel, spec)
        usable = view is not None and any(r.state == "ready" for r in view.replicas.values())
        incarnation = spec.incarnation if spec is not None else 0
        first = min(map(int, spec.placement), default=0) if spec is not None else 0
        wanted = fleet.Wanted(kernel, frozenset(indexes), incarnation, usable, self._site.now(), first)
        if indexes or any(id.kernel == kernel for id in self._site.replicas):
            self._handle(wanted)
        self.log_changed(kernel, members=True)

    def _placed(self, spec: KernelSpec | None) -> set[int]:
        placement = spec.placement if spec is not None else {}
        return {int(i) for i, host in placement.items() if host == self._site.host}

    def remove_unwanted(self) -> None:
        """Once, when the records have been read for the first time: replicas of before that are placed elsewhere now,
        or whose kernel is gone, are ended before any new one is started."""
        for id in list(self._site.replicas):
            view = self._site.view(id.kernel)
            if id.index not in self._placed(view.spec if view is not None else None):
                self._handle(fleet.Unwanted(id))

    def log_changed(self, kernel: str, members: bool = False) -> None:
        """There are entries (or members) to push."""
        for id, replica in self._site.replicas.items():
            if id.kernel == kernel and replica.session is not None:
                replica.session.news(members)

    def _no_room(self, spec: KernelSpec, indexes: set[int]) -> set[int]:
        """Replicas beyond what this host takes; they are reported as failed."""
        new = sorted(i for i in indexes if not self._fleet.wants(ReplicaId(spec.kernel, i)))
        room = max(0, self._site.settings.max_replicas - self._fleet.count())
        limit = self._site.settings.max_replicas
        reason = f"host {self._site.host} runs {limit} replicas already, its limit; add a host or raise max_replicas"
        for index in new[room:]:
            record = ReplicaRecord(
                index=index, host=self._site.host, state="failed", incarnation=spec.incarnation, reason=reason
            )
            guard = placed_here(self._site, spec.kernel, index)
            self._publisher.put(keys.replica(spec.kernel, index), record, guard=guard)
        self._refused |= {ReplicaId(spec.kernel, index) for index in new[room:]}
        self._refused -= {ReplicaId(spec.kernel, index) for index in new[:room]}
        return set(new[room:])

    def _forget_refused(self, kernel: str, spec: KernelSpec | None) -> None:
        """Their records go with the wish for them."""
        for id in [id for id in self._refused if id.kernel == kernel]:
            if spec is None or spec.placement.get(str(id.index)) != self._site.host:
                self._refused.discard(id)
                self._publisher.remove(keys.replica(id.kernel, id.index))

    def heard(self, replica: LocalReplica) -> None:
        self._handle(fleet.Hello(replica.id, self._site.now()))

    def progressed(self, replica: LocalReplica) -> None:
        view = self._site.view(replica.id.kernel) if replica.imported else None
        if view is not None and view.spec is not None:
            self._runtime.imported(replica.id.kernel, view.spec.owner, replica.imported)
        replica.imported = ()
        self._write_record(replica, urgent=False)

    def _handle(self, event: fleet.Event) -> None:
        if self._site.stopping:
            return
        for step in self._fleet.handle(event):
            match step:
                case fleet.Start(id, incarnation):
                    task = self._site.spawn(self._start(id, incarnation), f"starting replica {id.index} of {id.kernel}")
                    self._starting.add(task)
                    task.add_done_callback(self._starting.discard)
                case fleet.Stop(id, reason):
                    self._site.replicas[id].end(reason)
                case fleet.Publish(id, state, reason):
                    replica = self._site.replicas.get(id) or self._prepare(id)
                    replica.state, replica.reason = state, reason
                    self._write_record(replica)
                case fleet.Forget(id):
                    self._forget(id)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._fleet.next_due()
        if due is not None:
            delay = max(0.0, due - self._site.now())
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(delay, lambda: self._handle(fleet.Tick(self._site.now())))

    def _write_record(self, replica: LocalReplica, urgent: bool = True) -> None:
        if self._fleet.wants(replica.id):
            key = keys.replica(replica.id.kernel, replica.id.index)
            guard = placed_here(self._site, replica.id.kernel, replica.id.index)
            self._publisher.put(key, replica.record(self._site.host), urgent, guard)

    # -- starting and ending ------------------------------------------------------------------------------------------

    def _prepare(self, id: ReplicaId) -> LocalReplica:
        """The replica with the ports it had before, where it had any."""
        ip = self._site.settings.ip
        saved = self._site.rundir.load_replica(id).get("ports")
        ports = None
        with contextlib.suppress(TypeError):
            ports = Ports(**saved) if isinstance(saved, dict) else None
        replica = LocalReplica(id, self._site.rundir.folder(id), ip, ports or free_ports(ip))
        self._site.replicas[id] = replica
        return replica

    async def _start(self, id: ReplicaId, incarnation: int) -> None:
        replica = self._site.replicas[id]
        view = self._site.view(id.kernel)
        # As it was when the start began: the kernel may be deleted while a container is made.
        spec = view.spec if view is not None else None
        if spec is None:
            self._handle(fleet.Died(id, "the kernel is gone", self._site.now()))
            return
        try:
            await self._open(replica)
            replica.begin()
            again = self._site.rundir.load_replica(id).get("incarnation") == incarnation
            replica.incarnation = incarnation
            if not bindable(replica.ip, replica.ports):
                replica.ports = free_ports(replica.ip)
            # Before it runs: on a full disk none must run that a restarted daemon would not find.
            self._save(replica, spec)
            handle = await self._runtime.start(self._launch(replica, spec, again))
        except (RuntimeFailed, OSError) as err:
            log.error("%s: %s", replica.name, err)
            self._handle(fleet.Died(id, str(err), self._site.now()))
            return
        if handle.ports is not None:
            replica.ports = handle.ports
            with contextlib.suppress(OSError):  # a restarted daemon asks the container
                self._save(replica, spec)
        log.info("%s started as process %d", replica.name, handle.pid)
        self._site.meters.started(again=replica.starts > 0)
        replica.reason = ""
        self._run(replica, handle)
        self._write_record(replica)

    def _save(self, replica: LocalReplica, spec: KernelSpec) -> None:
        ports = numbers(replica.ports)
        self._site.rundir.save_replica(
            replica.id, incarnation=replica.incarnation, ports=ports, memory_limit=spec.memory_limit
        )

    def _run(self, replica: LocalReplica, handle: Handle) -> None:
        replica.handle = handle
        replica.starts += 1
        self._site.spawn(self._watch(replica, handle), f"watching {replica.name}")
        if self._memory_watch is None or self._memory_watch.done():
            self._memory_watch = self._site.spawn(self._watch_memory(), "watching memory")
        if why := self._fleet.ends(replica.id):
            replica.end(why)

    async def _watch(self, replica: LocalReplica, handle: Handle) -> None:
        ended = await handle.wait()
        reason = replica.death_reason or str(ended)
        log.info("%s, process %d: %s", replica.name, handle.pid, reason)
        self._site.meters.ended("daemon" if replica.death_reason else "itself")
        replica.handle = None
        if replica.session is not None:
            replica.session.close()
            replica.session = None
        self._commits.replica_died(replica, f"replica {replica.id.index} on host {self._site.host}: {reason}")
        self._handle(fleet.Died(replica.id, reason, self._site.now()))

    def _launch(self, replica: LocalReplica, spec: KernelSpec, again: bool) -> Launch:
        connection = {
            "key": spec.key,
            "signature_scheme": "hmac-sha256",
            "curve_publickey": spec.curve_publickey,
            "curve_secretkey": spec.curve_secretkey,
            "kernel_name": "nbos",
        }
        return Launch(
            kernel=spec.kernel,
            index=replica.id.index,
            incarnation=replica.incarnation,
            owner=spec.owner,
            folder=replica.folder,
            connection=connection,
            ip=replica.ip,
            ports=replica.ports,
            command=self._site.settings.replica_command,
            cwd=spec.cwd,
            env=spec.env,
            image=spec.image,
            memory=spec.memory_limit,
            again=again,
            tell=lambda text: self._tell(replica, text),
        )

    def _tell(self, replica: LocalReplica, text: str) -> None:
        """What a start waits for stands in the replica's record, where its user sees it."""
        if replica.handle is None and replica.state == "starting" and self._site.replicas.get(replica.id) is replica:
            replica.reason = text
            self._write_record(replica, urgent=False)

    async def _open(self, replica: LocalReplica) -> None:
        """Its socket listens."""
        if replica.server is None:
            self._site.rundir.make_folder(replica.id)
            path, mode = self._runtime.socket(replica.folder), self._runtime.socket_mode
            replica.server = await listen(path, lambda reader, writer: self._connected(replica, reader, writer), mode)

    async def _open_for_sure(self, replica: LocalReplica) -> None:
        """Of one that runs already: where its socket cannot be made now (the disk is full), soon."""
        try:
            await self._open(replica)
        except OSError as err:
            log.error("%s cannot be reached: %s; it is tried again", replica.name, err)
            asyncio.get_running_loop().call_later(REACH_AGAIN, self._reach, replica)

    def _reach(self, replica: LocalReplica) -> None:
        if self._site.replicas.get(replica.id) is replica:
            self._site.spawn(self._open_for_sure(replica), f"a socket for {replica.name}")

    async def _connected(
        self, replica: LocalReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        assert self.answer is not None
        # Cancelled when the daemon ends; asyncio's streams (3.11) would print that as an error.
        with contextlib.suppress(asyncio.CancelledError):
            await Session(self._site, replica, reader, writer, self.answer).run()

    def _forget(self, id: ReplicaId) -> None:
        replica = self._site.replicas.pop(id, None)
        if replica is not None and replica.server is not None:
            replica.server.close()
        self._publisher.remove(keys.replica(id.kernel, id.index))
        self._site.rundir.forget(id)
        for kernel in {id.kernel for id in self._refused}:
            # There is room for one that was refused.
            self.kernel_changed(kernel, self._site.view(kernel))

    # -- memory -------------------------------------------------------------------------------------------------------

    async def _watch_memory(self) -> None:
        """Runs only while a replica with a limit does."""
        while limited := [
            (r, m) for r in self._site.replicas.values() if r.handle is not None and (m := self._limit(r))
        ]:
            for replica, limit in limited:
                used = replica.handle.memory() if replica.handle is not None else 0
                if used > limit and replica.handle is not None:
                    amounts = f"{used / GIB:.2f} of {limit / GIB:.2f} GiB memory"
                    replica.death_reason = f"killed: it used {amounts}; use less, or ask for a larger limit"
                    replica.handle.kill()
            await asyncio.sleep(MEMORY_EVERY)

    def _limit(self, replica: LocalReplica) -> int:
        view = self._site.view(replica.id.kernel)
        return view.spec.memory_limit if view is not None and view.spec is not None else 0

    # -- the daemon's own start and end -------------------------------------------------------------------------------

    async def find_again(self) -> None:
        """Take up the replicas that an earlier daemon left running, with their grants. Before anything else starts."""
        for id, saved in list(self._site.rundir.saved_replicas()):
            handle = await self._runtime.find(self._site.rundir.folder(id))
            if handle is None:
                self._site.rundir.save_grant(id, None)
                continue
            replica = self._prepare(id)
            replica.incarnation = int(saved.get("incarnation", 1))
            replica.ports = handle.ports or replica.ports
            self._fleet.handle(fleet.Found(id, replica.incarnation, self._site.now()))
            self._commits.found(replica)
            grant = self._site.rundir.load_grant(id)
            if grant is not None:
                refused = self._site.queue.restore(grant, self._site.now())
                if refused:
                    log.error("%s: %s", replica.name, refused)
            log.info("%s found again as process %d", replica.name, handle.pid)
            await self._open_for_sure(replica)
            self._run(replica, handle)
        await self._runtime.clear([replica.folder for replica in self._site.replicas.values()])

    async def stop_all(self, seconds: float) -> None:
        """End every replica, and wait until they are gone."""
        if self._starting:
            # A process that is just being made would be left behind.
            await asyncio.wait(self._starting, timeout=seconds / 2)
        running = [r for r in self._site.replicas.values() if r.handle is not None]
        handles = [r.handle for r in running if r.handle is not None]
        for replica in running:
            replica.end(f"host {self._site.host} shuts down")
        gone = [self._site.spawn(_gone(self._site, r), f"the end of {r.name}") for r in running]
        if gone:
            await asyncio.wait(gone, timeout=min(EXIT_GRACE, seconds))
        for handle in handles:
            handle.kill()
        if gone:
            await asyncio.wait(gone, timeout=seconds)


async def _gone(site: Site, replica: LocalReplica) -> None:
    while replica.handle is not None:
        await asyncio.sleep(0.02)
