"""What the real NVML bindings find above a played driver: devices, MIG instances, and each way in which it may fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes import build
from tests.fakes.nvml import PlayedNVML, gpu, mig

LOOK = """
import json, msgspec
from gpu_daemon import inventory
inventory._sms_by_uuid = lambda: {"0": 132, "1": 120}  # libcuda's part: below
found = inventory.look()
devices = [msgspec.structs.asdict(device) for device in found.devices]
print(json.dumps({"state": found.state.name, "detail": found.detail, "driver": found.driver, "devices": devices}))
"""

LOST, NO_PERMISSION, NOT_SUPPORTED = 15, 4, 3


def look(folder: Path, *lines: str, old: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = PlayedNVML(folder, *lines, old=old).python(LOOK)
    return found


def test_models_memory_tpcs_sms_and_capability_are_read(tmp_path: Path) -> None:
    found = look(tmp_path, gpu(0), gpu(1, name="NVIDIA_A100-SXM4-80GB", memory=85 << 30, cc="8.0"))
    first, second = found["devices"]
    assert (found["state"], found["driver"]) == ("WORKS", "580.65.06")
    assert (first["model"], first["tpcs"], first["sms"], first["capability"]) == ("NVIDIA H200", 66, 132, "9.0")
    assert (second["model"], second["tpcs"], second["memory"]) == ("NVIDIA A100-SXM4-80GB", 60, 85 << 30)
    assert [d["healthy"] for d in found["devices"]] == [True, True]


UUID = "6d2a3c1e-0102-0304-0506-0708090a0b0c"


@pytest.mark.parametrize(
    ("environment", "tpcs"),
    [
        ({"FAKE_CUDA_SMS": "114"}, 57),
        ({"FAKE_CUDA_FAIL": "cuInit:999"}, 0),
        ({"FAKE_CUDA_FAIL": "cuDeviceGetAttribute:1"}, 0),
        ({"FAKE_CUDA_UUID": "00000000-0000-0000-0000-000000000001"}, 0),
    ],
)
def test_sms_are_counted_by_the_cuda_driver_of_the_very_device(
    tmp_path: Path, environment: dict[str, str], tpcs: int
) -> None:
    driver = PlayedNVML(tmp_path, gpu(0, uuid=f"GPU-{UUID}"))
    build(driver.library, "cuda.c", "libcuda.so.1")
    code = "\n".join(line for line in LOOK.splitlines() if "_sms_by_uuid" not in line)
    (device,) = driver.python(code, **{"FAKE_CUDA_UUID": UUID, **environment})["devices"]
    assert (device["tpcs"], device["sms"], device["healthy"]) == (tpcs, 2 * tpcs, tpcs > 0)
    assert bool(tpcs) != ("number of its SMs" in device["reason"])


@pytest.mark.parametrize(
    ("lines", "state"),
    [(["init 9"], "NO_DRIVER"), (["init 18"], "NO_DRIVER"), ([], "NO_DEVICE"), (["init 12"], "NO_LIBRARY")],
)
def test_a_machine_without_gpus_says_what_is_missing(tmp_path: Path, lines: list[str], state: str) -> None:
    found = look(tmp_path, *lines)
    assert (found["state"], found["devices"]) == (state, [])


def test_every_mig_instance_is_a_device_of_its_own(tmp_path: Path) -> None:
    found = look(
        tmp_path, gpu(0, mig=1), mig(0), mig(1, name="NVIDIA_H200_MIG_2g.35gb", memory=35 << 30, sms=32), gpu(1)
    )
    small, large, whole = found["devices"]
    assert (small["uuid"], small["parent"], small["tpcs"], small["memory"]) == ("MIG-0", "GPU-0", 8, 18 << 30)
    assert (large["model"], large["tpcs"], large["healthy"]) == ("NVIDIA H200 MIG 2g.35gb", 16, True)
    assert (whole["uuid"], whole["parent"]) == ("GPU-1", "")


def test_mig_without_an_instance_is_told_and_granted_to_nobody(tmp_path: Path) -> None:
    (device,) = look(tmp_path, gpu(0, mig=1))["devices"]
    assert not device["healthy"]
    assert "no instance" in device["reason"]


def test_one_lost_device_hides_none_of_the_others(tmp_path: Path) -> None:
    found = look(tmp_path, gpu(0), gpu(1), f"fault nvmlDeviceGetHandleByIndex_v2 0 {LOST}")
    lost, well = found["devices"]
    assert "lost" in lost["reason"]
    assert (lost["healthy"], well["uuid"], well["healthy"]) == (False, "GPU-1", True)


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("nvmlDeviceGetHandleByIndex_v2", NO_PERMISSION, "no permission"),
        ("nvmlDeviceGetUUID", 999, "does not tell its UUID"),
        ("nvmlDeviceGetMemoryInfo", NO_PERMISSION, "memory could not be read: no permission"),
        ("nvmlDeviceGetMemoryInfo", LOST, "lost"),
    ],
)
def test_what_cannot_be_read_makes_a_device_unusable_with_the_reason(
    tmp_path: Path, function: str, code: int, words: str
) -> None:
    bad, well = look(tmp_path, gpu(0), gpu(1), f"fault {function} 0 {code}")["devices"]
    assert words in bad["reason"]
    assert (bad["healthy"], well["healthy"]) == (False, True)


def test_what_a_device_does_not_support_stops_nothing(tmp_path: Path) -> None:
    (device,) = look(tmp_path, gpu(0, cc=None), f"fault nvmlDeviceGetName * {NOT_SUPPORTED}")["devices"]
    assert (device["healthy"], device["capability"], device["model"]) == (True, "", "unknown")


def test_an_old_driver_that_lacks_functions_still_shows_its_devices(tmp_path: Path) -> None:
    (device,) = look(tmp_path, gpu(0, mig=1), old=True)["devices"]
    assert (device["uuid"], device["healthy"]) == ("GPU-0", True)


def test_nbos_doctor_names_what_cannot_be_granted_and_why(tmp_path: Path) -> None:
    code = "import json; from nbos.doctor import check_gpus; found = check_gpus(); print(json.dumps(found.text))"
    text = PlayedNVML(tmp_path, gpu(0, mig=1), mig(0), gpu(1, mig=1)).python(code)
    assert text.startswith("1 NVIDIA GPU(s): NVIDIA H200 MIG 1g.18gb, driver 580.65.06; GPU 1 cannot be granted: MIG")


def test_a_driver_that_breaks_under_the_count_is_said(tmp_path: Path) -> None:
    found = look(tmp_path, gpu(0), "fault nvmlDeviceGetCount_v2 * 999")
    assert (found["state"], found["devices"]) == ("NO_DEVICE", [])
    assert found["detail"]
