"""A thread that waits for the driver's XIDs: NVML tells each once, to who listens at that moment.

Guarantees: an XID reaches the daemon's loop as soon as NVML tells it; a device or driver that cannot be listened to is
said in the log, once; the thread ends with the process, whatever it hangs in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from gpu_daemon.nvml import NVML, DeviceLost, NVMLGone, Untold, text

log = logging.getLogger("gpu_daemon")

WAIT_MS = 10_000
"""How long one call of NVML waits. It returns at once when there is an event: this only bounds how often it wakes."""
AGAIN = 10.0
"""Seconds until it tries anew where listening failed."""

Heard = Callable[[str, int], None]


class XIDListener:
    """heard(uuid, xid) is called in `loop`."""

    def __init__(self, module: Any, uuids: Iterable[str], loop: asyncio.AbstractEventLoop, heard: Heard) -> None:
        self._nvml, self._uuids = NVML(module), tuple(uuids)
        self._loop, self._heard = loop, heard
        self._said: set[str] = set()

    def start(self) -> None:
        threading.Thread(target=self._run, name="listening for XIDs", daemon=True).start()

    def _run(self) -> None:
        while not self._loop.is_closed():
            try:
                self._listen()
            except (NVMLGone, DeviceLost) as err:
                # Which device is lost, and whether NVML works, the samples find out.
                self._say(f"XIDs of the GPUs cannot be heard: {err}")
            time.sleep(AGAIN)

    def _listen(self) -> None:
        """Until it fails. Raises NVMLGone or DeviceLost."""
        self._nvml.start()
        try:
            events = self._nvml.ask("nvmlEventSetCreate")
            if isinstance(events, Untold):
                self._say(f"XIDs of the GPUs cannot be heard: {events.why}")
                return
            try:
                heard = [self._register(uuid, events) for uuid in self._uuids]
                if any(heard):
                    self._wait(events, all(answer is not None for answer in heard))
            finally:
                self._nvml.ask("nvmlEventSetFree", events, gone=False)
        finally:
            self._nvml.stop()

    def _register(self, uuid: str, events: Any) -> bool | None:
        """Whether its XIDs are heard from now on. None: not now, the device is lost; it may be back later."""
        try:
            kind = self._nvml.module.nvmlEventTypeXidCriticalError
            answer = self._nvml.ask("nvmlDeviceRegisterEvents", self._nvml.handle(uuid), kind, events)
        except DeviceLost as err:
            self._say(f"XIDs of GPU {uuid} cannot be heard: {err}")
            return None
        if isinstance(answer, Untold):
            self._say(f"XIDs of GPU {uuid} cannot be heard: {answer.why}")
            return False
        return True

    def _wait(self, events: Any, complete: bool) -> None:
        """Hand on what comes; returns when NVML has something else to say than that nothing came, and (where not all
        devices could be listened to) now and then, to try those again."""
        module = self._nvml.module
        while not self._loop.is_closed():
            try:
                event = module.nvmlEventSetWait_v2(events, WAIT_MS)
            except module.NVMLError as err:
                if err.value == module.NVML_ERROR_TIMEOUT and complete:
                    continue
                if err.value == module.NVML_ERROR_TIMEOUT:
                    return
                self._say(f"XIDs of the GPUs cannot be heard: {err}")
                return
            found = self._nvml.ask("nvmlDeviceGetUUID", event.device)
            if isinstance(found, Untold):
                self._say(f"XID {int(event.eventData)} of a GPU whose UUID is not told: {found.why}")
                continue
            with contextlib.suppress(RuntimeError):  # the daemon ended meanwhile
                self._loop.call_soon_threadsafe(self._heard, text(found), int(event.eventData))

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning("%s", what)
