"""Smaller parts: requests as they are read, how ends are told, what replicas inherit, the run directory, options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpu_daemon import inventory, requests
from gpu_daemon.app import GPUDaemon
from gpu_daemon.fleet import ReplicaId
from gpu_daemon.process_runtime import clean_environment
from gpu_daemon.requests import RequestError
from gpu_daemon.rundir import RunDir, RunDirError
from gpu_daemon.runtime import Exit
from nbos_cluster.records import Device, GrantRecord


def test_a_bid_is_read_whole() -> None:
    bid = requests.bid({"n": 3, "attempt": 2, "kind": "sync", "resources": {"gpus": 1}, "wait": True, "applied": 2})
    assert (bid.n, bid.attempt, bid.kind, bid.resources.gpus, bid.wait, bid.applied) == (3, 2, "sync", 1, True, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"n": True},
        {"n": 1.5},
        {"n": 10**13},
        {"kind": "party"},
        {"wait": "yes"},
        {"resources": {"gpus": -1}},
        {"resources": {"spaceships": 1}},
        {"resources": {"model": "x" * 5000}},
        {"applied": None},
    ],
)
def test_a_bid_with_a_wrong_field_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        requests.bid({"n": 1, "applied": 0, **fields})


def test_text_that_is_no_unicode_is_made_harmless() -> None:
    assert requests.lost({"lost": {"x": "\ud800"}}) == {"x": "?"}


def test_ends_are_told_in_words() -> None:
    assert "out-of-memory" in str(Exit(signal=9))
    assert "segmentation fault" in str(Exit(signal=11))
    assert str(Exit(code=3)) == "ended with exit status 3"
    assert "not known" in str(Exit())


def test_replicas_inherit_only_what_is_listed() -> None:
    environ = {"PATH": "/bin", "LC_ALL": "C", "PYTHONPATH": "/x", "AWS_SECRET_ACCESS_KEY": "s", "ETCDCTL_KEY": "k"}
    assert clean_environment(environ, {"MINE": "1"}) == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "PYTHONPATH": "/x",
        "MINE": "1",
    }


def test_a_run_directory_with_too_long_a_path_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="bytes shorter"):
        RunDir(tmp_path / ("x" * 100)).open()


def test_a_second_daemon_on_the_same_run_directory_is_refused(tmp_path: Path) -> None:
    first = RunDir(tmp_path / "run")
    first.open()
    with pytest.raises(RunDirError, match="another gpu_daemon"):
        RunDir(tmp_path / "run").open()
    first.close()


def test_what_is_saved_is_found_again_and_what_is_broken_left_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.open()
    id, other = ReplicaId("kernel", 1), ReplicaId("kernel", 2)
    for one in (id, other):
        run.make_folder(one)
        run.save_replica(one, incarnation=4)
    (run.folder(other) / "replica.json").write_text("{")
    grant = GrantRecord(grant="g", host="h", owner="o", kernel="kernel", replica=1, n=1, shares=())
    run.save_grant(id, grant)
    assert [(i, saved["incarnation"]) for i, saved in run.saved_replicas()] == [(id, 4)]
    assert run.load_grant(id) == grant
    run.save_grant(id, None)
    assert run.load_grant(id) is None


def test_configuration_comes_from_a_file_and_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"GPUDaemon": {"host": "h", "run_dir": str(tmp_path), "simulated_devices": 2}}))
    app = GPUDaemon()
    with pytest.raises(SystemExit):
        app.initialize(["--config", str(file)])
    assert "blob_store is not set" in capsys.readouterr().err
    assert [d.tpcs for d in app.find_devices()] == [66, 66]


def test_a_daemon_takes_only_the_gpus_named_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> inventory.Inventory:
        devices = (Device(uuid=f"GPU-{i}", index=i, model="H200", tpcs=66, memory=1, kind="nvml") for i in range(2))
        return inventory.Inventory(inventory.NVMLState.WORKS, devices=tuple(devices))

    monkeypatch.setattr(inventory, "look", found)
    app = GPUDaemon(devices="nvml", device_uuids=["GPU-1", "GPU-gone"])
    assert [d.uuid for d in app.find_devices()] == ["GPU-1"]


def test_simulated_devices_may_be_of_several_models() -> None:
    app = GPUDaemon(host="h", devices="simulated", simulated_devices=3, simulated_model="H100, A100")
    assert [d.model for d in app.find_devices()] == ["H100", "A100", "H100"]
