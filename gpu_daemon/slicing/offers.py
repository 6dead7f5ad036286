"""What this host offers to hold slices with, as it is now: MPS daemons start and end while kernels live.

`Offers` is asked for each grant; `watch` looks again every `EVERY` seconds and tells when something has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from gpu_daemon.aside import aside
from gpu_daemon.slicing import mps
from gpu_daemon.slicing.mechanism import Choice, Facts, Mechanism, choose, held, is_mig, published
from nbos_cluster.records import Device, DeviceShare

log = logging.getLogger("gpu_daemon")

EVERY = 10.0


class Offers:
    """`look` reads the facts; it may block. Without one (no real device) nothing is offered, and nothing is claimed."""

    def __init__(self, look: Callable[[], Facts] | None = None, at_most: Mechanism = "mig") -> None:
        self._look, self._at_most = look, at_most
        self._choice: Choice | None = None

    def published(self, devices: Iterable[Device]) -> tuple[Device, ...]:
        """The devices with the mechanism of their slices, for the host's record."""
        return tuple(published(device, self._choices(device)) for device in devices)

    def held(self, shares: Iterable[DeviceShare], devices: Iterable[Device]) -> tuple[DeviceShare, ...]:
        """The shares of a new grant, each with what holds it."""
        known = {device.uuid: device for device in devices}
        return tuple(held(share, known.get(share.uuid), self._choices(known.get(share.uuid))) for share in shares)

    def lendable(self, devices: Iterable[Device]) -> list[str]:
        """The devices (UUIDs) whose slices can change while a cell runs."""
        return [device.uuid for device in devices if not self._fixed(device.uuid, device.kind)]

    def no_loans(self, shares: Iterable[DeviceShare]) -> str:
        """Why nothing is lent on the device of a slice, '' where it is."""
        return next((why for share in shares if not share.whole and (why := self._fixed(share.uuid, share.kind))), "")

    def _fixed(self, uuid: str, kind: str) -> str:
        if kind != "nvml":
            return ""
        if is_mig(uuid):
            return "nothing is lent on an instance of MIG: it cannot change while a cell runs"
        if self._choice is None:
            return "nothing is lent yet: what holds slices here is not known"
        if self._choice.mechanism == "percentage":
            return "nothing is lent: the MPS limit that holds slices here is fixed when CUDA starts in a process"
        return ""

    def _choices(self, device: Device | None) -> dict[str, Choice]:
        if self._choice is None or device is None or device.kind != "nvml":
            return {}
        return {device.uuid: self._choice}

    async def watch(self, changed: Callable[[], None]) -> None:
        """For as long as the daemon lives. changed: called when the choice is another than before."""
        while self._look is not None:
            choice = choose(await aside(self._look, "looking at MPS"), self._at_most)
            if choice != self._choice:
                self._choice = choice
                log.info("slices are held by: %s%s", choice.mechanism, f" ({choice.why})" if choice.why else "")
                changed()
            await asyncio.sleep(EVERY)


def facts(pipe: str, one_domain: bool, container_user: str = "") -> Facts:
    """How this host stands. container_user: whom replicas in containers run as, '' where they are processes.
    Blocking."""
    trouble = mps.look(pipe) or (mps.from_containers(container_user, pipe) if container_user else "")
    return Facts(_cuda_version(), trouble, pipe, one_domain)


def _cuda_version() -> int:
    """What the driver speaks, from NVML: it makes no context and keeps no device open."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as err:
        log.debug("the driver's CUDA version is not known: %s", err)
        return 0
