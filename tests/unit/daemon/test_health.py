"""What NVML may say of a device, and what becomes of it: no new grants, a reason, and back when it is well."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from typing import Any

import pytest

from gpu_daemon import health, inventory, sms
from gpu_daemon.health import HealthWatch, NVMLHealth
from gpu_daemon.ledger import Impossible, Ledger, Request
from nbos_cluster.records import Device, Resources

LOST, NOT_SUPPORTED, TIMEOUT, NOT_FOUND = 15, 3, 10, 6


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeNVML:
    """The calls that are used, of one device."""

    NVMLError = NVMLError
    NVML_ERROR_GPU_IS_LOST, NVML_ERROR_NOT_SUPPORTED = LOST, NOT_SUPPORTED
    NVML_ERROR_TIMEOUT, NVML_ERROR_NOT_FOUND = TIMEOUT, NOT_FOUND
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, nvmlEventTypeXidCriticalError = 1, 0, 8

    def __init__(self) -> None:
        self.ecc: int | NVMLError = 0
        self.rows: tuple[int, ...] | NVMLError = (0, 0, 0, 0)
        self.memory: object | NVMLError = object()
        self.xids: list[int] = []
        self.down = False

    def nvmlInit(self) -> None:
        if self.down:
            raise NVMLError(9)

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: object, kinds: int, events: str) -> None:
        assert (handle, kinds, events) == ("handle", 8, "events")

    def nvmlEventSetWait_v2(self, events: str, timeout: int) -> object:
        if not self.xids:
            raise NVMLError(TIMEOUT)
        return types.SimpleNamespace(device="handle", eventData=self.xids.pop(0))

    def nvmlDeviceGetUUID(self, handle: object) -> str:
        return "GPU-0"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> object:
        return _told(self.memory)

    def nvmlDeviceGetTotalEccErrors(self, handle: object, kind: int, counter: int) -> object:
        return _told(self.ecc)

    def nvmlDeviceGetRemappedRows(self, handle: object) -> object:
        return _told(self.rows)


def _told(value: object) -> object:
    if isinstance(value, NVMLError):
        raise value
    return value


@pytest.mark.parametrize(
    ("ill", "words"),
    [
        ({}, ""),
        ({"ecc": NVMLError(NOT_SUPPORTED), "rows": NVMLError(NOT_SUPPORTED)}, ""),
        ({"xids": [13, 31, 43]}, ""),
        ({"ecc": 2}, "2 uncorrected memory errors"),
        ({"rows": (0, 1, 0, 1)}, "could not be replaced"),
        ({"memory": NVMLError(LOST)}, "the device is lost"),
        ({"ecc": NVMLError(LOST)}, "the device is lost"),
        ({"xids": [31, 79]}, "fallen off the bus (XID 79)"),
    ],
)
def test_a_device_is_ill_for_a_reason_that_is_told(ill: dict[str, Any], words: str) -> None:
    nvml = FakeNVML()
    for name, value in ill.items():
        setattr(nvml, name, value)
    reason = NVMLHealth(nvml, ["GPU-0"]).read()["GPU-0"]
    assert words in reason
    assert bool(words) == bool(reason)


def test_a_fatal_xid_is_remembered_and_a_memory_error_is_not_after_a_reset() -> None:
    nvml = FakeNVML()
    reader = NVMLHealth(nvml, ["GPU-0"])
    nvml.ecc = 1
    assert reader.read()["GPU-0"]
    nvml.ecc = 0
    assert not reader.read()["GPU-0"]
    nvml.xids = [48]
    assert reader.read()["GPU-0"]
    assert reader.read()["GPU-0"]


def test_a_driver_that_went_away_makes_its_devices_unusable() -> None:
    nvml = FakeNVML()
    nvml.down = True
    assert "NVML does not work" in NVMLHealth(nvml, ["GPU-0"]).read()["GPU-0"]


def ledger() -> Ledger:
    return Ledger("h", [Device(uuid="GPU-0", index=0, model="H", tpcs=4, memory=8 << 30, kind="nvml")])


def wish() -> Request:
    return Request("g", "ada", "k", 0, 1, Resources(gpus=1))


async def test_an_ill_device_gets_no_new_grant_until_it_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "EVERY", 0.0)
    accounts, changed, reasons = ledger(), asyncio.Event(), {"GPU-0": "it is lost"}
    watch = asyncio.create_task(HealthWatch(lambda: dict(reasons), accounts, changed.set).run())
    await asyncio.wait_for(changed.wait(), 5)
    assert (accounts.devices[0].healthy, accounts.devices[0].reason) == (False, "it is lost")
    assert isinstance(accounts.reserve(wish()), Impossible)
    changed.clear()
    reasons["GPU-0"] = ""
    await asyncio.wait_for(changed.wait(), 5)
    assert not isinstance(accounts.reserve(wish()), Impossible)
    watch.cancel()


async def test_a_driver_that_hangs_makes_its_devices_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "STUCK", 0.05)
    accounts, changed, answer = ledger(), asyncio.Event(), threading.Event()

    def hang() -> dict[str, str]:
        answer.wait(10)
        return {"GPU-0": ""}

    watch = asyncio.create_task(HealthWatch(hang, accounts, changed.set).run())
    await asyncio.wait_for(changed.wait(), 5)
    assert "has not answered" in accounts.devices[0].reason
    changed.clear()
    answer.set()
    await asyncio.wait_for(changed.wait(), 5)
    assert accounts.devices[0].healthy
    watch.cancel()


def test_the_cuda_driver_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return types.SimpleNamespace(stdout=b'{"abc": 132}')

    monkeypatch.setattr(inventory.subprocess, "run", run)
    assert inventory._sms_by_uuid() == {"abc": 132}
    assert asked[0][0] == sys.executable
    assert asked[0][-1] == sms.__file__
    monkeypatch.undo()
    assert isinstance(inventory._sms_by_uuid(), dict)
