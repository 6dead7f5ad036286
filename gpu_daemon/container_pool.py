"""Containers of this host that were started ahead and wait: made and dropped as `warming` decides, handed out singly.

Guarantees: a container is handed out at most once, and only for its own image, as that is now, and its own owner, where
owners' containers differ; what has run a user's code never comes back; a daemon that is started again goes on with
those that wait, if it would make the same ones. Without one, replicas start afresh as they would without this.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_daemon import memory, warming
from gpu_daemon.container_spec import LABEL, DockerOptions, Kind, Place, kind_of, ports_of, waiting
from gpu_daemon.containers import Containers, read_exit
from gpu_daemon.docker_engine import Trouble, words
from gpu_daemon.ports import free_ports
from gpu_daemon.runtime import RuntimeFailed
from gpu_daemon.site import log
from gpu_daemon.slot import Slot
from gpu_daemon.warm_pool import WarmOptions
from gpu_daemon.warm_process import READY_WITHIN, NotWarm, Ready, environment_reads
from gpu_daemon.warming import Warming
from nbos_cluster.records import Device, Ports, WarmRecord

LOOK_EVERY = 5.0
"""Seconds between two looks at the host's memory and the demand."""
IMAGES_EVERY = 30.0
"""Seconds between two looks whether a name stands for another image by now."""
HEAD_START = 1.0
"""Seconds that a start has before the container that it took is made again: the Engine's work for that, and the
imports of the new one, would take the processor from the kernel's first cell."""
ENDS = "the daemon ends"
BACK_WITHIN = 3.0
"""Seconds in which a container that waited before the daemon's restart must report."""


@dataclass
class Spare:
    """A container that waits."""

    kind: Kind
    slot: Slot
    container: str
    pid: int
    image_id: str
    ports: Ports
    ready: Ready
    mps: str
    """Pipe folder of MPS that it sees."""


class ContainerPool:
    """ip: at which ports are published. slots: the folder for slots. changed: called when `records` may differ."""

    def __init__(
        self, options: WarmOptions, containers: Containers, devices: Sequence[Device], ip: str, slots: Path
    ) -> None:
        kinds = [kind_of(image, "", containers.options) for image in options.images or (containers.options.image,)]
        # Where containers depend on their owner, there are none for anybody.
        anybody = kind_of("", "?", containers.options).owner == ""
        always = tuple(map(str, kinds)) if anybody else ()
        self._warming = Warming(replace(options.policy, images=always, head_start=HEAD_START))
        self._kinds = {str(kind): kind for kind in kinds}
        self._options, self._containers, self._devices, self._ip, self._slots = options, containers, devices, ip, slots
        self._spares: dict[str, list[Spare]] = {}
        self._coming: dict[str, asyncio.Future[None]] = {}
        """Containers that are being made, by id; done when the Engine says that one ended."""
        self._notes: dict[str, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._firm: set[asyncio.Task[Any]] = set()
        """Those that make a container: cancelled, they could leave one behind."""
        self._refused: set[tuple[str, ...]] = set()
        self._closing = self._begun = False
        self._timer: asyncio.TimerHandle | None = None
        self._early: list[warming.Event] = []
        """What happened before it was known what waits."""
        self.network = ""
        self.changed: Callable[[], None] = lambda: None

    # -- beginning and end --------------------------------------------------------------------------------------------

    def open(self, found: Iterable[Mapping[str, Any]]) -> set[str]:
        """Begin; the ids of those of `found`, the Engine's list of this host's containers, that are the pool's care."""
        ours = [c for c in found if f"{LABEL}warm" in c["Labels"] and self._is_slot(c)]
        self._spawn(self._begin(ours))
        return {c["Id"] for c in ours}

    def _is_slot(self, found: Mapping[str, Any]) -> bool:
        """Whether it waited still: those that became replicas, or were about to, have a replica's name."""
        return f"/{self._containers.site.name(found['Labels'].get(f'{LABEL}folder', '-'))}" in found["Names"]

    async def _begin(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Take up what waited for the daemon before. Nothing is made until that is known."""
        taken = await asyncio.gather(*(self._take_up(c) for c in found))
        for container, spare in zip(found, taken, strict=True):
            if spare is None or sum(map(len, self._spares.values())) >= self._options.policy.most:
                self._containers.remove(container["Id"])
                Slot(self._slots / container["Labels"][f"{LABEL}folder"]).remove()
            else:
                self._add(spare)
        self._begun = True
        here = [(name, spare.ready.private) for name, spares in self._spares.items() for spare in spares]
        self._handle(warming.Found(tuple(here), _now()))
        for event in self._early:
            self._handle(event)
        self._spawn(self._look())
        self._spawn(self._look_at_images())

    async def close(self, leave: bool) -> None:
        """leave: those that wait stay for the next daemon."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks - self._firm:
            task.cancel()
        for coming in self._coming.values():
            if not coming.done():
                coming.set_result(None)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for spare in [spare for spares in self._spares.values() for spare in spares]:
            self._unwatch(spare)
            spare.slot.close()
            if not leave:
                self._discard(spare)

    async def _take_up(self, found: Mapping[str, Any]) -> Spare | None:
        labels = found["Labels"]
        kind = kind_of(labels.get(f"{LABEL}image", ""), labels.get(f"{LABEL}owner", ""), self._containers.options)
        slot = Slot(self._slots / labels[f"{LABEL}folder"])
        try:
            ports = ports_of(labels)
            if ports is None:
                raise ValueError("its ports are not known")
            options = self._containers.usable()
            body = self._body(kind, Place(slot.name, slot.folder, self._ip, ports), options)
            image_id = await self._containers.engine.image_id(kind.image)
            if not body["Labels"].items() <= labels.items() or found["ImageID"] != image_id:
                return None
            async with asyncio.timeout(BACK_WITHIN):
                ready = await slot.ready(slot.listen())
            described = await self._containers.engine.call(lambda api: api.inspect_container(found["Id"]))
        except (RuntimeFailed, NotWarm, OSError, TimeoutError, ValueError, TypeError, *Trouble) as err:
            log.info("container %s is not kept: %s", found["Id"][:12], err or type(err).__name__)
            return None
        log.info("container %s (%s) waits as before", found["Id"][:12], kind)
        return Spare(kind, slot, found["Id"], int(described["State"]["Pid"]), image_id, ports, ready, options.mps)

    # -- what is told and asked ---------------------------------------------------------------------------------------

    def records(self) -> tuple[WarmRecord, ...]:
        """By image: whose the containers would be is nobody else's business."""
        now, sums = _now(), dict[str, WarmRecord]()
        for name in self._warming.images():
            image = self._kinds[name].image
            known = sums.get(image, WarmRecord(image=image))
            note = "memory is short" if self._warming.short else self._notes.get(name, "")
            ready, wanted = self._warming.ready(name), self._warming.wanted(name, now)
            sums[image] = WarmRecord(
                image=image, ready=known.ready + ready, wanted=known.wanted + wanted, note=known.note or note
            )
        return tuple(record for record in sums.values() if record.ready or record.wanted or record.note)

    def expect(self, wanted: Iterable[tuple[str, str]]) -> None:
        """owner and image of the kernels that may be asked for soon."""
        options = self._containers.options
        kinds = {kind_of(image or options.image, owner, options) for owner, image in wanted}
        self._kinds |= {str(kind): kind for kind in kinds}
        self._handle(warming.Expected(frozenset(map(str, kinds)), _now()))

    def take(self, image: str, image_id: str, owner: str, env: Mapping[str, str]) -> Spare | None:
        """A container for a replica with these additions to the environment; it is the caller's. None: start afresh."""
        kind = kind_of(image, owner, self._containers.options)
        name = str(kind)
        self._kinds[name] = kind
        self._handle(warming.Arrived(name, _now()))
        spares = self._spares.get(name, [])
        while spares:
            base = self._containers.options.environment
            if reads := environment_reads(spares[0].ready, base, {**base, **env}):
                self._refuse(tuple(reads))
                return None
            spare = spares.pop(0)
            self._unwatch(spare)
            self._handle(warming.Gone(name, _now()))
            # One that was made before its host had MPS would never reach it.
            mps = self._containers.usable().mps
            if spare.slot.alive() and spare.image_id == image_id and spare.mps == mps:
                return spare
            self._discard(spare)
        return None

    def _refuse(self, reads: tuple[str, ...]) -> None:
        if reads not in self._refused:
            self._refused.add(reads)
            log.info("replicas with their own %s start afresh: warm ones have read that already", ", ".join(reads))

    def died(self, container: str) -> None:
        """The Engine says that a container ended; it may be one of these."""
        coming = self._coming.get(container)
        if coming is not None and not coming.done():
            coming.set_result(None)

    # -- making and dropping ------------------------------------------------------------------------------------------

    def _handle(self, event: warming.Event) -> None:
        if self._closing:
            return
        if not self._begun:
            self._early.append(event)
            return
        for step in self._warming.handle(event):
            match step:
                case warming.Make(name):
                    self._spawn(self._make(self._kinds[name]))
                case warming.Drop(name):
                    spare = self._spares[name].pop()
                    self._unwatch(spare)
                    self._discard(spare)
        self._set_timer()
        self.changed()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = _now()
        if (due := self._warming.due(now)) is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(due - now, lambda: self._handle(warming.Tick(_now())))

    async def _make(self, kind: Kind) -> None:
        began, name = _now(), str(kind)
        try:
            image_id = await self._containers.image(kind.image, lambda _: None)
            if (task := asyncio.current_task()) is not None:
                self._firm.add(task)
            spare = await self._start(kind, image_id)
        except (RuntimeFailed, NotWarm, OSError, *Trouble) as err:
            said = str(err) if isinstance(err, RuntimeFailed | NotWarm) else words(err)
            if self._notes.get(name) != said:
                log.warning("no container of %s is kept warm: %s", kind, said)
            self._notes[name] = said
            self._handle(warming.Failed(name, _now()))
            return
        self._notes[name] = "; ".join(f"{module}: {why}" for module, why in spare.ready.failed.items())
        self._add(spare)
        self._handle(warming.Made(name, _now() - began, spare.ready.private, _now()))

    async def _start(self, kind: Kind, image_id: str) -> Spare:
        slot, engine, container = await asyncio.to_thread(Slot.make, self._slots), self._containers.engine, ""
        listener, options = None, self._containers.usable()
        try:
            listener = slot.listen()
            place = Place(slot.name, slot.folder, self._ip, free_ports(self._ip))
            body = self._body(kind, place, options)
            container = await self._containers.create(body, self._containers.site.name(slot.name))
            self._coming[container] = asyncio.get_running_loop().create_future()
            if self._closing:
                raise NotWarm(ENDS)
            await engine.call(lambda api: api.start(container))
            ready = await self._come_up(slot, listener, container, kind.image)
            found = await engine.call(lambda api: api.inspect_container(container))
        except BaseException:
            if container:
                self._containers.remove(container)
            if listener is not None:
                listener.close()
            slot.remove()
            raise
        finally:
            self._coming.pop(container, None)
        return Spare(kind, slot, container, int(found["State"]["Pid"]), image_id, place.ports, ready, options.mps)

    async def _come_up(self, slot: Slot, listener: Any, container: str, image: str) -> Ready:
        reporting = asyncio.create_task(slot.ready(listener), name=f"container {container[:12]} comes up")
        try:
            ended = self._coming[container]
            both: set[asyncio.Future[Any]] = {reporting, ended}
            await asyncio.wait(both, timeout=READY_WITHIN, return_when=asyncio.FIRST_COMPLETED)
            if reporting.done():
                return reporting.result()
        finally:
            reporting.cancel()
        if self._closing:
            raise NotWarm(ENDS)
        if not self._coming[container].done():
            raise NotWarm(f"its imports took more than {READY_WITHIN:g} s")
        raise NotWarm(str(await self._containers.engine.call(lambda api: read_exit(api, container, image))))

    def _body(self, kind: Kind, place: Place, options: DockerOptions) -> dict[str, Any]:
        containers = self._containers
        user = containers.user(kind.owner)
        return waiting(kind, place, options, containers.site, user, self.network, self._devices, self._options.modules)

    def _add(self, spare: Spare) -> None:
        self._kinds[str(spare.kind)] = spare.kind
        self._spares.setdefault(str(spare.kind), []).append(spare)
        asyncio.get_running_loop().add_reader(spare.slot.fileno(), self._ended, spare)

    def _unwatch(self, spare: Spare) -> None:
        asyncio.get_running_loop().remove_reader(spare.slot.fileno())

    def _ended(self, spare: Spare) -> None:
        """One that waits says nothing: its line can be read when it is gone."""
        name = str(spare.kind)
        if spare in self._spares.get(name, ()):
            self._unwatch(spare)
            self._spares[name].remove(spare)
            log.warning("container %s ended before it was needed", spare.container[:12])
            self._discard(spare)
            self._handle(warming.Gone(name, _now()))

    def _discard(self, spare: Spare) -> None:
        self._containers.remove(spare.container)
        spare.slot.remove()

    # -- looking ------------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        while True:
            known = {*self._warming.images(), *(name for name, spares in self._spares.items() if spares)}
            self._kinds = {name: kind for name, kind in self._kinds.items() if name in known}
            self._handle(warming.Memory(memory.host.available(), _now()))
            await asyncio.sleep(LOOK_EVERY)

    async def _look_at_images(self) -> None:
        """Containers of an image that was got anew are replaced, also when nobody asks for one."""
        while True:
            await asyncio.sleep(IMAGES_EVERY)
            for image in {spare.kind.image for spares in self._spares.values() for spare in spares}:
                try:
                    now = await self._containers.engine.image_id(image)
                except Trouble as err:
                    log.debug("image %s cannot be looked at: %s", image, words(err))
                else:
                    self._drop_stale(image, now)

    def _drop_stale(self, image: str, image_id: str) -> None:
        for name, spares in self._spares.items():
            for spare in [s for s in spares if s.kind.image == image and s.image_id != image_id]:
                if spare not in spares:  # too many, when the one before was gone
                    continue
                log.info("container %s waits with an older %s; it is replaced", spare.container[:12], image)
                self._unwatch(spare)
                spares.remove(spare)
                self._discard(spare)
                self._handle(warming.Gone(name, _now()))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._firm.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("keeping containers warm failed", exc_info=error)


def _now() -> float:
    return time.monotonic()
