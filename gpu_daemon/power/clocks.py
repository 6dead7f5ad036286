"""Setting clocks: through NVML, or on simulated devices. Nothing is decided here; calls may block for some 50 ms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from gpu_daemon.nvml import NVML, DeviceLost, NVMLGone, Untold

SIMULATED = tuple(range(345, 1981, 15))
"""MHz of a simulated device: an H200's."""


class ClockFailed(Exception):
    """The clocks cannot be set; says of which device and why."""


class Clocks(Protocol):
    def known(self) -> dict[str, tuple[int, ...]]:
        """What each device can be locked to, MHz, ascending; devices that do not say so are left out."""
        ...

    def lock(self, uuid: str, mhz: int) -> None:
        """No higher than this. Raises ClockFailed."""
        ...

    def reset(self, uuid: str) -> None:
        """As high as they like. Raises ClockFailed."""
        ...


class NVMLClocks:
    """module: pynvml. Started once, for as long as the process lives."""

    def __init__(self, module: Any, uuids: Iterable[str]) -> None:
        self._nvml, self._uuids = NVML(module), tuple(uuids)
        self._started = False
        self._lowest: dict[str, int] = {}

    def known(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for uuid in self._uuids:
            try:
                clocks = self._supported(self._handle(uuid))
            except ClockFailed:
                continue
            if clocks:
                found[uuid], self._lowest[uuid] = clocks, clocks[0]
        return found

    def _supported(self, handle: Any) -> tuple[int, ...]:
        memory = self._nvml.ask("nvmlDeviceGetSupportedMemoryClocks", handle)
        if isinstance(memory, Untold) or not memory:
            return ()
        graphics = self._nvml.ask("nvmlDeviceGetSupportedGraphicsClocks", handle, max(memory))
        return () if isinstance(graphics, Untold) else tuple(sorted(map(int, graphics)))

    def lock(self, uuid: str, mhz: int) -> None:
        # A range, and no single clock: a device that idles goes on saving by itself.
        self._call(uuid, "nvmlDeviceSetGpuLockedClocks", min(self._lowest.get(uuid, mhz), mhz), mhz)

    def reset(self, uuid: str) -> None:
        self._call(uuid, "nvmlDeviceResetGpuLockedClocks")

    def _call(self, uuid: str, call: str, *args: int) -> None:
        handle = self._handle(uuid)
        try:
            answer = self._nvml.ask(call, handle, *args)
        except (DeviceLost, NVMLGone) as err:
            raise ClockFailed(f"GPU {uuid}: {err}") from err
        if isinstance(answer, Untold):
            root = "; the daemon has to run as root for that" if answer.why == "no permission" else ""
            raise ClockFailed(f"GPU {uuid}: {call} failed: {answer.why}{root}")

    def _handle(self, uuid: str) -> Any:
        try:
            if not self._started:
                self._nvml.start()
                self._started = True
            return self._nvml.handle(uuid)
        except (DeviceLost, NVMLGone) as err:
            raise ClockFailed(f"GPU {uuid}: {err}") from err


class SimulatedClocks:
    """Played: they live as long as the daemon."""

    def __init__(self, uuids: Iterable[str]) -> None:
        self._uuids = tuple(uuids)

    def known(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self._uuids, SIMULATED)

    def lock(self, uuid: str, mhz: int) -> None:
        return None

    def reset(self, uuid: str) -> None:
        return None
