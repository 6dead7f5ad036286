"""Looks at a played driver through the real NVML bindings: what is read, what is not told, what is heard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes.nvml import PlayedNVML, gpu, mig

LOOK = """
import json, msgspec, pynvml
from gpu_daemon.sampling import Sampler
from nbos_cluster.records import Device
def device(uuid, parent=""):
    return Device(uuid=uuid, index=0, model="m", tpcs=8, memory=1, kind="nvml", parent=parent)
sampler = Sampler(pynvml, {devices})
sights = [sampler.look() for _ in range({looks})]
sight = sights[-1]
print(json.dumps({{"gone": sight.looked.gone,
    "samples": {{uuid: vars(sample) for uuid, sample in sight.looked.samples.items()}},
    "readings": {{uuid: {{name: getattr(reading, name) for name in reading.__struct_fields__}}
                 for uuid, reading in sight.readings.items()}}}}, default=msgspec.to_builtins))
"""
LOST, NO_PERMISSION, NOT_SUPPORTED = 15, 4, 3


def look(
    folder: Path, *lines: str, devices: str = "[device('GPU-0')]", looks: int = 1, old: bool = False
) -> dict[str, Any]:
    code = LOOK.format(devices=devices, looks=looks)
    seen: dict[str, Any] = PlayedNVML(folder, *lines, old=old).python(code)
    return seen


def test_use_heat_power_errors_and_processes_are_read(tmp_path: Path) -> None:
    seen = look(tmp_path, gpu(0, procs="4711:1048576,4712:-", mps="4713:5", ecc=3))
    reading, sample = seen["readings"]["GPU-0"], seen["samples"]["GPU-0"]
    assert [reading[k] for k in ("memory", "utilisation", "temperature", "power", "power_limit", "ecc")] == [
        1 << 30,
        87,
        41,
        310,
        700,
        3,
    ]
    assert reading["processes"] == [{"pid": 4711, "memory": 1 << 20}, {"pid": 4712}, {"pid": 4713, "memory": 5}]
    assert reading["untold"] == {}
    assert (sample["ecc"], sample["temperature"], sample["limit"], sample["lost"]) == (3, 41, 90, "")


def test_what_a_device_does_not_tell_is_named_with_the_reason(tmp_path: Path) -> None:
    faults = ["nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"]
    line = gpu(0, power=None, limit=None, utilisation=None, temperature=None, slowdown=None, ecc=None, rows=None)
    seen = look(tmp_path, line, *(f"fault {name} * {NO_PERMISSION}" for name in faults))
    reading = seen["readings"]["GPU-0"]
    assert reading["untold"] == {
        "power": "not supported",
        "power_limit": "not supported",
        "utilisation": "not supported",
        "temperature": "not supported",
        "ecc": "not supported",
        "processes": "no permission",
    }
    assert (reading["power"], reading["memory"]) == (-1, 1 << 30)
    assert (seen["samples"]["GPU-0"]["ecc"], seen["samples"]["GPU-0"]["remap_failed"]) == (None, False)


def test_an_old_driver_tells_what_it_can(tmp_path: Path) -> None:
    seen = look(tmp_path, gpu(0, procs="4711:7", reasons=0x40), old=True)
    assert seen["readings"]["GPU-0"]["processes"] == [{"pid": 4711, "memory": 7}]
    assert seen["samples"]["GPU-0"]["slowed"]
    assert seen["samples"]["GPU-0"]["action"] == ""


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"rows": "0,2,0,1"}, "remap_failed", True),
        ({"rows": "0,2,1,0"}, "remap_failed", False),
        ({"reasons": 0x44}, "slowed", True),
        ({"reasons": 0x24}, "slowed", False),
        ({"recovery": 4}, "action", "no new work on it, then a reset"),
        ({"recovery": 99}, "action", "what it calls recovery action 99"),
    ],
)
def test_each_complaint_is_seen(tmp_path: Path, changes: dict[str, Any], field: str, value: Any) -> None:
    assert look(tmp_path, gpu(0, **changes))["samples"]["GPU-0"][field] == value


def test_what_waits_for_a_reset_is_a_note(tmp_path: Path) -> None:
    seen = look(tmp_path, gpu(0, rows="0,1,1,0", pages=1))
    assert len(seen["readings"]["GPU-0"]["notes"]) == 2


@pytest.mark.parametrize("call", ["nvmlDeviceGetHandleByUUID", "nvmlDeviceGetPowerUsage"])
def test_a_lost_device_is_told_and_the_others_are_read(tmp_path: Path, call: str) -> None:
    seen = look(tmp_path, gpu(0), gpu(1), f"fault {call} 0 {LOST}", devices="[device('GPU-0'), device('GPU-1')]")
    assert seen["samples"]["GPU-0"]["lost"]
    assert list(seen["readings"]) == ["GPU-1"]


def test_a_device_that_nvml_does_not_list_any_more_is_lost(tmp_path: Path) -> None:
    assert "does not find it" in look(tmp_path, gpu(1))["samples"]["GPU-0"]["lost"]


def test_a_driver_that_went_away_is_told_at_every_look(tmp_path: Path) -> None:
    seen = look(tmp_path, "init 9", looks=2)
    assert seen["gone"]
    assert not seen["samples"]


def test_nvml_is_started_anew_after_it_broke(tmp_path: Path) -> None:
    driver = PlayedNVML(tmp_path, gpu(0), "fault nvmlDeviceGetMemoryInfo * 1")
    code = LOOK.format(devices="[device('GPU-0')]", looks=1)
    again = "import pathlib; path = pathlib.Path(__import__('os').environ['NBOS_FAKE_NVML'])\n"
    again += "assert sampler.look().looked.gone\npath.write_text(path.read_text().splitlines()[0])\n"
    again += "assert sampler.look().looked.samples['GPU-0'].ecc == 0\n"
    assert driver.python(code.replace("print(", again + "print("))["gone"]


def test_a_mig_instance_has_its_own_memory_and_processes(tmp_path: Path) -> None:
    lines = [gpu(0, mig=1, procs="1:5:7"), mig(0, used=77, procs="1:5"), mig(1, used=88)]
    devices = "[device('MIG-0', 'GPU-0'), device('MIG-1', 'GPU-0')]"
    seen = look(tmp_path, *lines, devices=devices)
    first, second = seen["readings"]["MIG-0"], seen["readings"]["MIG-1"]
    assert (first["memory"], first["temperature"], first["utilisation"]) == (77, 41, -1)
    assert "MIG" in first["untold"]["utilisation"]
    assert (len(first["processes"]), second["memory"], second["processes"]) == (1, 88, [])
    assert list(seen["samples"]) == ["GPU-0"]


LISTEN = """
import asyncio, json, logging, os, pynvml
from gpu_daemon import xid_listener
xid_listener.AGAIN, xid_listener.WAIT_MS = 0.05, 100
said = []
class Ear(logging.Handler):
    def emit(self, record): said.append(record.getMessage())
logging.getLogger("gpu_daemon").addHandler(Ear())
async def main():
    loop, heard, enough = asyncio.get_running_loop(), [], asyncio.Event()
    def hear(uuid, xid):
        heard.append((uuid, xid))
        if len(heard) == {wanted}: enough.set()
    xid_listener.XIDListener(pynvml, ["GPU-0", "GPU-1"], loop, hear).start()
    path = os.environ["NBOS_FAKE_NVML"]
    for line in {lines}:
        # NVML tells an event only to who listens: said again until it was heard.
        before = len(heard)
        while True:
            with open(path, "a") as file: file.write(line + chr(10))
            await asyncio.sleep(0.3)
            if len(heard) > before or ({wanted} == 0 and said): break
    if {wanted}: await asyncio.wait_for(enough.wait(), 20)
    print(json.dumps([heard, said]))
asyncio.run(main())
"""


def listen(driver: PlayedNVML, *lines: str, wanted: int) -> Any:
    return driver.python(LISTEN.format(lines=list(lines), wanted=wanted))


def test_xids_are_heard_of_each_device_as_they_come(tmp_path: Path) -> None:
    heard, said = listen(PlayedNVML(tmp_path, gpu(0), gpu(1)), "event 1 79", "event 0 31", wanted=2)
    assert heard[0] == ["GPU-1", 79]
    assert heard[-1] == ["GPU-0", 31]
    assert said == []


def test_a_device_that_cannot_be_listened_to_silences_none_of_the_others(tmp_path: Path) -> None:
    driver = PlayedNVML(tmp_path, gpu(0), gpu(1), f"fault nvmlDeviceRegisterEvents 0 {NOT_SUPPORTED}")
    heard, said = listen(driver, "event 1 48", wanted=1)
    assert heard[0] == ["GPU-1", 48]
    assert said == ["XIDs of GPU GPU-0 cannot be heard: not supported"]


def test_a_driver_too_old_for_events_is_said_once(tmp_path: Path) -> None:
    # Each line takes 0.3 s, in which it tries again several times.
    heard, said = listen(PlayedNVML(tmp_path, gpu(0), gpu(1), old=True), "event 0 79", "event 0 79", wanted=0)
    assert heard == []
    assert len(said) == 1
