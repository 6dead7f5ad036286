"""`nbos gpus`: its tables, and what of a real device's reading a caller may see."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nbos import cli
from nbos.gpus import asks, lasted, report, spans, tables
from nbos_cluster import keys
from nbos_cluster.records import (
    Device,
    DeviceShare,
    GPUProcess,
    GrantRecord,
    HostRecord,
    Leftover,
    QueueTicket,
    Reading,
    Resources,
)
from nbos_spawner.gateway.auth import Caller
from nbos_spawner.gateway.copy import ClusterCopy
from nbos_spawner.gateway.dashboard import render_dashboard
from nbos_spawner.gateway.models import status_model

from .cluster_data import filled, host, put, spec

ADA, ROOT = Caller("ada", "user", admin=False), Caller("root", "user", admin=True)
REAL = Device(uuid="GPU-0", index=0, model="NVIDIA H200", tpcs=66, memory=140 << 30, kind="nvml", capability="9.0")
READING = Reading(
    uuid="GPU-0",
    memory=11 << 30,
    utilisation=87,
    temperature=64,
    power=410,
    power_limit=700,
    ecc=0,
    processes=(
        GPUProcess(pid=71, memory=10 << 30, kernel="kernel-of-ada", replica=1, owner="ada"),
        GPUProcess(pid=72, memory=-1),
    ),
    notes=("a row of its memory is replaced at the next reset",),
)


def cluster(device: Device = REAL, reading: Reading | None = READING) -> ClusterCopy:
    copy = filled(spec("kernel-of-ada"), hosts=("b",))
    readings = (reading,) if reading is not None else ()
    record = HostRecord(name="a", address="", pid=1, devices=(device,), readings=readings, driver="580.65.06")
    copy.apply_hosts(put(keys.host("a"), record), now=0.0)
    share = DeviceShare(
        uuid="GPU-0",
        index=0,
        model="H",
        tpcs=(0, 1, 2, 8),
        memory=9 << 30,
        whole=False,
        kind="nvml",
        mechanism="green",
    )
    grant = GrantRecord(
        grant="g", host="a", owner="ada", kernel="kernel-of-ada", replica=1, n=12, shares=(share,), since=900.0
    )
    copy.apply_hosts(put(keys.grant("a", "g"), grant), now=0.0)
    return copy


def shown(copy: ClusterCopy, caller: Caller = ROOT, now: float = 1000.0) -> str:
    return "\n".join(tables(report(status_model(copy, caller)), now))


def row(text: str, *words: str) -> str:
    """The one line with all the words."""
    (found,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return " ".join(found.split())


def test_a_real_device_shows_use_heat_power_and_health() -> None:
    text = shown(cluster())
    assert row(text, "NVIDIA H200") == "a 0 NVIDIA H200 4/66 9G/140G 11G 87 % 64 °C 410/700 W healthy"
    assert "GPU 0 of a: a row of its memory is replaced at the next reset" in text


def test_a_grant_shows_user_kernel_cell_tpcs_memory_and_for_how_long() -> None:
    assert row(shown(cluster()), "green") == "ada kernel-o 12 a 0 4 (0-2,8) 9G green 1:40"


def test_processes_are_shown_with_whose_they_are() -> None:
    text = shown(cluster())
    assert row(text, "71", "10G") == "71 a 0 10G ada, kernel kernel-o"
    assert row(text, "nobody") == "72 a 0 - nobody here"


def test_others_processes_are_counted_only() -> None:
    (device,) = status_model(cluster(), ADA)["hosts"][0]["devices"]
    assert [p["pid"] for p in device["reading"]["processes"]] == [71]
    assert device["reading"]["others"] == 1
    (device,) = status_model(cluster(), Caller("bob", "user", admin=False))["hosts"][0]["devices"]
    assert (device["reading"]["processes"], device["reading"]["others"]) == ([], 2)


def test_what_idle_notebooks_left_is_shown_to_their_owner_and_admins() -> None:
    left = (
        Leftover("GPU-0", "kernel-of-ada", 1, "ada", 6 << 30),
        Leftover("GPU-0", "k2", 0, "bob", 2 << 30, "checkpoint"),
    )
    copy = cluster()
    copy.apply_hosts(put(keys.host("a"), replace(copy.hosts["a"], left=left)), now=0.0)
    text = shown(copy)
    assert row(text, "on the GPU") == "ada kernel-o 1 a 0 6G on the GPU"
    assert row(text, "host memory") == "bob k2 0 a 0 2G in host memory: a checkpoint"
    (device,) = status_model(copy, ADA)["hosts"][0]["devices"]
    assert [one["owner"] for one in device["left"]] == ["ada"]


def test_the_dashboard_shows_how_a_device_is() -> None:
    page = render_dashboard(status_model(cluster(), ROOT), name="x", admin=True, prefix="/p/").decode()
    assert "11G in use, 87 % busy, 64 °C, 410 W, a row of its memory is replaced" in page


def test_what_is_not_told_is_a_dash() -> None:
    reading = replace(READING, utilisation=-1, temperature=-1, power=-1, memory=-1)
    assert row(shown(cluster(reading=reading)), "NVIDIA H200") == "a 0 NVIDIA H200 4/66 9G/140G - - - -/700 W healthy"


@pytest.mark.parametrize(("passing", "words"), [(True, "paused: too hot"), (False, "out of use: too hot")])
def test_a_sick_device_shows_why(passing: bool, words: str) -> None:
    device = replace(REAL, healthy=False, reason="too hot", passing=passing)
    assert words in row(shown(cluster(device, None)), "NVIDIA H200")


def test_simulated_devices_are_marked_and_hosts_without_any_are_shown() -> None:
    copy = filled(hosts=("b",))
    copy.apply_hosts(put(keys.host("c"), replace(host("c"), devices=(), draining=True)), now=0.0)
    text = shown(copy)
    assert row(text, "simulated") == "b 0 H100 (simulated) 0/66 0/80G - - - - healthy"
    assert row(text, "none") == "c (draining) none"
    assert "no GPU is granted" in text


def test_a_cell_that_waits_on_several_hosts_is_one_line() -> None:
    copy = cluster()
    for name, position, estimate in (("a", 2, -1.0), ("b", 1, 75.0)):
        ticket: dict[str, Any] = {
            "ticket": f"t{name}",
            "host": name,
            "owner": "ada",
            "kernel": "kernel-of-ada",
            "n": 13,
        }
        wish = Resources(tpcs=16, memory=20 << 30, model="H200")
        record = QueueTicket(
            **ticket, resources=wish, position=position, reason=f"{name} is full", since=940.0, estimate=estimate
        )
        copy.apply_queues(put(keys.ticket(name, f"t{name}"), record))
    line = row(shown(copy), "is full")
    assert line == "ada kernel-o 13 16 TPCs, 20G, H200 1:00 1 on b and 1 more, about 1:15 more b is full"


def test_numbers_for_people() -> None:
    assert [spans([]), spans([3]), spans([3, 1, 2, 7, 9, 8])] == ["", "3", "1-3,7-9"]
    assert [lasted(-3), lasted(59.4), lasted(60), lasted(3671)] == ["0 s", "59 s", "1:00", "1:01:11"]
    assert [asks({"gpus": 2}), asks({"tpcs": 4, "model": "A100"})] == ["2 GPUs", "4 TPCs, A100"]


def test_a_clusters_address_wants_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["gpus", "--url", "http://127.0.0.1:9/"])
    assert "--token-file" in capsys.readouterr().err
