"""Which mechanism holds slices: the strongest there is, MPS only inside one trust domain, always with the reason."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traitlets import TraitError

from gpu_daemon.slicing import mps, offers
from gpu_daemon.slicing.config import Slicing
from gpu_daemon.slicing.mechanism import Choice, Facts, choose
from gpu_daemon.slicing.offers import Offers
from nbos_cluster.records import Device, DeviceShare

ALL = Facts(driver=13000, mps="", pipe="/mps", one_domain=True)
ORDER = ["cooperative", "percentage", "green", "mig"]
DEVICE = Device(uuid="GPU-a", index=0, model="H200", tpcs=66, memory=1 << 37, kind="nvml")


def share(uuid: str = "GPU-a", tpcs: int = 8) -> DeviceShare:
    return DeviceShare(uuid=uuid, index=0, model="H200", tpcs=tuple(range(tpcs)), memory=1, whole=False, kind="nvml")


def test_green_contexts_where_nothing_is_in_the_way() -> None:
    assert choose(ALL) == Choice("green", "", "/mps")


@pytest.mark.parametrize(
    ("facts", "mechanism", "why"),
    [
        (replace(ALL, driver=12020), "percentage", "speaks CUDA 12.2; green contexts need 12.4"),
        (replace(ALL, driver=0), "percentage", "does not tell its CUDA version"),
        (replace(ALL, mps="no MPS daemon runs"), "cooperative", "no MPS daemon runs"),
        (replace(ALL, one_domain=False), "cooperative", "Slicing.one_trust_domain"),
    ],
)
def test_what_is_in_the_way_is_said(facts: Facts, mechanism: str, why: str) -> None:
    choice = choose(facts)
    assert choice.mechanism == mechanism
    assert why in choice.why


FACTS = st.builds(
    Facts, st.sampled_from([0, 12020, 12040, 13000]), st.sampled_from(["", "away"]), st.just("/mps"), st.booleans()
)


@given(FACTS, st.sampled_from(ORDER))
def test_never_more_than_is_wanted_and_never_mps_between_strangers(facts: Facts, at_most: str) -> None:
    choice = choose(facts, at_most)  # type: ignore[arg-type]
    assert ORDER.index(choice.mechanism) <= ORDER.index(at_most)
    assert not choice.mps or (facts.one_domain and not facts.mps)
    assert bool(choice.mps) == (choice.mechanism != "cooperative")
    assert choice.why or choice.mechanism == "green"


async def offered(facts: Facts) -> Offers:
    found = Offers(lambda: facts)
    told = asyncio.Event()
    watch = asyncio.create_task(found.watch(told.set))
    await asyncio.wait_for(told.wait(), 5)
    watch.cancel()
    return found


async def test_a_grant_says_what_holds_it_and_the_host_s_record_too() -> None:
    found = await offered(ALL)
    (one,) = found.held([share()], [DEVICE])
    assert (one.mechanism, one.of, one.mps) == ("green", 66, "/mps")
    (device,) = found.published([DEVICE])
    assert (device.mechanism, device.why) == ("green", "")


async def test_a_mig_instance_that_is_granted_whole_is_held_by_mig() -> None:
    instance = Device(uuid="MIG-1", index=0, model="H200 MIG 1g", tpcs=8, memory=1, kind="nvml")
    found = await offered(replace(ALL, mps="no MPS daemon runs"))
    whole, part = found.held([share("MIG-1", 8), share("MIG-1", 4)], [instance])
    assert (whole.mechanism, part.mechanism) == ("mig", "cooperative")


async def test_nothing_is_claimed_of_a_simulated_device() -> None:
    played = Device(uuid="SIM-1", index=0, model="m", tpcs=8, memory=1, kind="simulated")
    found = await offered(ALL)
    assert found.published([played]) == (played,)
    assert found.held([share("SIM-1")], [played]) == (share("SIM-1"),)


async def test_a_change_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "EVERY", 0.001)
    said = [ALL, ALL, replace(ALL, mps="gone"), replace(ALL, mps="gone"), ALL]
    left = iter(said)
    done, told = asyncio.Event(), []

    found = Offers(lambda: next(left, ALL))

    def changed() -> None:
        told.append(found.published([DEVICE])[0].mechanism)
        if len(told) == 3:
            done.set()

    watch = asyncio.create_task(found.watch(changed))
    await asyncio.wait_for(done.wait(), 5)
    watch.cancel()
    assert told == ["green", "cooperative", "green"]


# -- MPS ---------------------------------------------------------------------------------------------------------------


def pipes(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "control"))
    return folder


def command(folder: Path, text: str) -> None:
    path = folder / mps.COMMAND
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_no_pipes_no_mps(tmp_path: Path) -> None:
    assert "no MPS daemon runs on this host" in mps.look(str(tmp_path))


def test_the_mps_daemon_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command(
        pipes(tmp_path), f'read asked; [ "$asked" = get_server_list ] && [ "$CUDA_MPS_PIPE_DIRECTORY" = {tmp_path} ]'
    )
    assert mps.look(str(tmp_path)) == ""
    command(tmp_path, "echo Cannot find MPS control daemon process; exit 1")
    assert "does not answer: Cannot find MPS control daemon process" in mps.look(str(tmp_path))
    monkeypatch.setattr(mps, "WITHIN", 0.2)
    command(tmp_path, "exec sleep 5")
    assert "has not answered" in mps.look(str(tmp_path))


def test_without_the_command_its_pid_file_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mps.look(str(pipes(tmp_path))) == ""
    (tmp_path / f"{mps.COMMAND}.pid").write_text(str(os.getpid()))
    assert mps.look(str(tmp_path)) == ""
    (tmp_path / f"{mps.COMMAND}.pid").write_text(str(2**22 + 1))  # above any pid
    assert "has ended" in mps.look(str(tmp_path))


@pytest.mark.parametrize(
    ("user", "owner", "said"),
    [
        ("1000:1000", 1000, ""),
        ("1000", 0, ""),
        ("1000:1000", 1001, "belongs to the Unix user 1001, replicas run as 1000"),
        ("owner", 1000, "give Docker.user one uid"),
    ],
)
def test_replicas_in_containers_use_an_mps_daemon_that_serves_their_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, owner: int, said: str
) -> None:
    os.chown(pipes(tmp_path) / "control", owner, -1)
    monkeypatch.setattr(mps, "look", lambda pipe: "")
    found = offers.facts(str(tmp_path), True, container_user=user).mps
    assert (said in found) if said else found == ""
    monkeypatch.setattr(mps, "look", lambda pipe: "no MPS daemon runs on this host")
    assert offers.facts(str(tmp_path), True, container_user=user).mps == "no MPS daemon runs on this host"


def test_a_relative_pipe_folder_is_refused() -> None:
    with pytest.raises(TraitError, match=r"Slicing\.mps_pipe must be an absolute path"):
        Slicing(mps_pipe="mps")


@pytest.mark.parametrize(
    ("facts", "uuid", "refused"),
    [
        (ALL, "GPU-a", ""),
        (replace(ALL, one_domain=False), "GPU-a", ""),
        (replace(ALL, driver=12030), "GPU-a", "the MPS limit that holds slices here is fixed"),
        (ALL, "MIG-a", "an instance of MIG: it cannot change while a cell runs"),
    ],
)
async def test_nothing_is_lent_where_slices_cannot_change(facts: Facts, uuid: str, refused: str) -> None:
    found = await offered(facts)
    device = msgspec.structs.replace(DEVICE, uuid=uuid)
    assert found.lendable([device]) == ([] if refused else [uuid])
    assert refused in found.no_loans([share(uuid)])
    assert Offers().lendable([device]) == [], "not known yet"
