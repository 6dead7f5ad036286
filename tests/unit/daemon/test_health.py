"""What becomes of a verdict, and what the CUDA driver is asked for."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from traitlets.config import Config

from gpu_daemon import inventory, sms
from gpu_daemon.app import GPUDaemon
from gpu_daemon.health_config import Health
from gpu_daemon.ledger import Busy, Impossible, Ledger, Request
from nbos_cluster.records import Device, GrantRecord, Resources


def device(number: int, **fields: Any) -> Device:
    fields = {"model": "NVIDIA H200", "tpcs": 4, "memory": 8 << 30, **fields}
    return Device(uuid=f"GPU-{number}", index=number, kind="nvml", **fields)


def wish(**resources: Any) -> Request:
    return Request("g", "ada", "k", 0, 1, Resources(**resources))


def test_who_asks_for_a_device_that_is_out_of_use_is_told_why() -> None:
    ledger = Ledger("h", [device(0)])
    ledger.set_health("GPU-0", False, "it has fallen off the bus (XID 79)")
    refused = ledger.reserve(wish(gpus=1))
    assert isinstance(refused, Impossible)
    assert "GPU 0 (NVIDIA H200) is out of use: it has fallen off the bus (XID 79)" in refused.reason


def test_who_asks_for_a_device_whose_trouble_passes_waits_and_is_told_why() -> None:
    ledger = Ledger("h", [device(0)])
    ledger.set_health("GPU-0", False, "too hot (95 °C)", passing=True)
    refused = ledger.reserve(wish(tpcs=1))
    assert isinstance(refused, Busy)
    assert "is out of use: too hot (95 °C)" in refused.reason
    ledger.set_health("GPU-0", True)
    assert isinstance(ledger.reserve(wish(tpcs=1)), GrantRecord)


def test_a_cell_that_waits_for_a_busy_device_hears_of_the_one_that_is_ill() -> None:
    ledger = Ledger("h", [device(0), device(1)])
    assert isinstance(ledger.reserve(wish(gpus=1)), GrantRecord)
    ledger.set_health("GPU-1", False, "lost")
    refused = ledger.fit(Resources(gpus=1))
    assert isinstance(refused, Busy)
    assert "0 of 2 GPUs" in refused.reason
    assert "GPU 1 (NVIDIA H200) is out of use: lost" in refused.reason


def test_a_process_gets_one_mig_instance_at_most() -> None:
    small = {"model": "NVIDIA H200 MIG 1g.18gb", "tpcs": 2, "memory": 2 << 30, "parent": "GPU-x"}
    ledger = Ledger("h", [device(0, **small), device(1, **small), device(2)])
    record = ledger.reserve(wish(gpus=1, model="1g.18gb"))
    assert isinstance(record, GrantRecord)
    assert (record.shares[0].uuid, record.shares[0].whole) == ("GPU-0", True)
    both = ledger.fit(Resources(gpus=2, model="1g.18gb"))
    assert isinstance(both, Impossible)
    assert "a cell can use one" in both.reason
    assert isinstance(ledger.fit(Resources(gpus=2)), Impossible)


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


@pytest.mark.parametrize(
    ("option", "value", "words"), [("every", 0.0, "use 0.1 or more"), ("steady", 0, "use 1 or more")]
)
def test_an_option_out_of_bounds_names_the_bound(option: str, value: float, words: str) -> None:
    with pytest.raises(Exception, match=words):
        Health(**{option: value})


def test_the_options_of_health_reach_the_watch() -> None:
    app = GPUDaemon()
    app.update_config(Config({"Health": {"every": 2.5, "ecc_limit": 3, "harmless_xids": [74]}}))
    options = Health(parent=app).options()
    assert (options.every, options.policy.ecc_limit, options.policy.harmless) == (2.5, 3, frozenset({74}))
