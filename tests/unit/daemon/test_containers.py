"""What replicas' containers are made of, which packets they may send, what an image lacks: decided without a Docker."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from traitlets import TraitError
from traitlets.config import Config

from gpu_daemon import container_check, walls
from gpu_daemon.app import GPUDaemon
from gpu_daemon.container_end import failed_start, memory_end, plain_end, told_end
from gpu_daemon.container_spec import (
    LABEL,
    DockerOptions,
    Kind,
    Place,
    Site,
    container,
    device_requests,
    fill,
    kind_of,
    safe_name,
    waiting,
)
from gpu_daemon.docker_config import Docker
from gpu_daemon.pulling import PullProgress
from gpu_daemon.pythons import other_python
from gpu_daemon.runtime import Exit, Launch, RuntimeFailed
from gpu_daemon.simulated import simulated
from nbos_cluster.kernelview import KernelView
from nbos_cluster.records import Device, Ports, ReplicaRecord

ROOT = Path(__file__).parents[3]
SITE = Site("lab", "gpu-1", "/var/lib/nbos")
LAUNCH = Launch(
    kernel="0123456789abcdef",
    index=2,
    incarnation=3,
    owner="ann",
    folder=Path("/var/lib/nbos/r/0f0f-2"),
    connection={"key": "secret"},
    ip="10.0.0.5",
    ports=Ports(shell=15001, iopub=15002, stdin=15003, control=15004, hb=15005),
)
GPU = Device(uuid="GPU-1", index=3, model="H200", tpcs=66, memory=1 << 37, kind="nvml")


def made(options: DockerOptions | None = None, devices: tuple[Device, ...] = (), **launch: Any) -> dict[str, Any]:
    return container(replace(LAUNCH, **launch), options or DockerOptions(), SITE, "1000:100", "net", devices)


def ahead(options: DockerOptions | None = None, slot: str = "s1", owner: str = "ann", port: int = 1) -> dict[str, Any]:
    place = Place(
        slot, Path("/var/lib/nbos/w") / slot, "10.0.0.5", Ports(**dict.fromkeys(LAUNCH.ports.__struct_fields__, port))
    )
    return waiting(Kind("", owner), place, options or DockerOptions(), SITE, "1000:100", "net", (), ["numpy"])


def test_the_hosts_mps_daemon_is_reached_only_in_one_trust_domain_and_nothing_else_of_the_host() -> None:
    def bound(options: DockerOptions) -> dict[str, Any]:
        return {m["Source"]: (m["Target"], m["ReadOnly"]) for m in made(options)["HostConfig"]["Mounts"]}

    without = bound(DockerOptions())
    assert not {"/run/mps", "/dev/shm"} & without.keys()
    more = {"/run/mps": ("/run/mps", False), "/dev/shm": ("/dev/shm", False)}
    assert bound(DockerOptions(mps="/run/mps")) == {**without, **more}
    ahead_too = {m["Source"] for m in ahead(DockerOptions(mps="/run/mps"))["HostConfig"]["Mounts"]}
    assert more.keys() <= ahead_too
    assert made(DockerOptions(mps="/run/mps"))["HostConfig"]["IpcMode"] == "private"


@pytest.mark.parametrize(
    ("slicing", "devices", "pipe"),
    [
        ({}, (GPU,), ""),
        ({"one_trust_domain": True}, (GPU,), "/run/mps"),
        ({"one_trust_domain": True}, (), ""),
        ({"one_trust_domain": True}, simulated("h", 1, "m", 2, 1), ""),
        ({"one_trust_domain": True, "at_most": "cooperative"}, (GPU,), ""),
    ],
)
def test_the_pipes_are_mounted_where_mps_is_wanted(
    slicing: dict[str, Any], devices: tuple[Device, ...], pipe: str
) -> None:
    app = GPUDaemon(config=Config({"Slicing": {"mps_pipe": "/run/mps", **slicing}}))
    assert app.mps_for_containers(devices) == pipe


# -- the container ----------------------------------------------------------------------------------------------------


def test_whatever_the_options_the_walls_stand() -> None:
    loose = DockerOptions(read_only=False, pids=64, volumes={}, gpus="none", walls="off", environment={"A": "b"})
    for options in (DockerOptions(), loose):
        host = made(options)["HostConfig"]
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host["Privileged"] is False
        assert host["IpcMode"] == "private"
        assert host["PidsLimit"] == options.pids
        assert not {"PidMode", "Devices", "CapAdd", "Binds", "UsernsMode"} & set(host)


def test_a_container_that_waits_is_that_of_a_replica_but_for_its_command_and_names() -> None:
    one, other = ahead(), made()
    differ = {name for name in one if one[name] != other[name]}
    assert differ == {"Entrypoint", "Cmd", "Hostname", "Labels", "ExposedPorts", "HostConfig"}
    host = {name for name in one["HostConfig"] if one["HostConfig"][name] != other["HostConfig"][name]}
    assert host == {"Mounts", "PortBindings"}
    assert one["HostConfig"]["Mounts"][:-1] == other["HostConfig"]["Mounts"][:-1]


def test_what_waits_is_known_again_whatever_its_slot_and_not_after_a_change_of_options() -> None:
    def mark(body: dict[str, Any]) -> str:
        return str(body["Labels"][f"{LABEL}warm"])

    assert mark(ahead()) == mark(ahead(slot="s2", port=2))
    changed = [DockerOptions(pids=99), DockerOptions(volumes={}), DockerOptions(environment={"A": "b"})]
    changed.append(DockerOptions(mps="/run/mps"))
    assert len({mark(body) for body in (ahead(), ahead(owner="bob"), *map(ahead, changed))}) == 6


@pytest.mark.parametrize(
    ("options", "owner"),
    [
        (DockerOptions(), "ann"),
        (DockerOptions(volumes={}), ""),
        (DockerOptions(volumes={"/data": {"bind": "/home/{owner}", "mode": "ro"}}), "ann"),
        (DockerOptions(volumes={}, home="/home/{username}"), "ann"),
        (DockerOptions(volumes={}, user="owner"), "ann"),
    ],
)
def test_what_waits_is_of_one_owner_where_anything_depends_on_owners(options: DockerOptions, owner: str) -> None:
    assert kind_of("i", "ann", options) == Kind("i", owner)


def test_of_the_host_only_its_own_folder_is_mounted_and_read_only() -> None:
    (own,) = made(DockerOptions(volumes={}))["HostConfig"]["Mounts"]
    assert own == {"Type": "bind", "Source": "/var/lib/nbos/r/0f0f-2/d", "Target": "/run/nbos", "ReadOnly": True}


def test_no_secret_stands_where_docker_inspect_shows_it() -> None:
    assert "secret" not in json.dumps(made())


def test_its_ports_are_published_on_the_hosts_address_only() -> None:
    ports = made()["HostConfig"]["PortBindings"]
    assert ports["15002/tcp"] == [{"HostIp": "10.0.0.5", "HostPort": "15002"}]
    assert len(ports) == 5


def test_the_kernels_limit_wins_over_the_hosts_and_leaves_no_swap() -> None:
    options = DockerOptions(memory=8 << 30, cpus=2.5)
    host = made(options)["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (8 << 30, 8 << 30, 2_500_000_000)
    assert made(options, memory=1 << 30)["HostConfig"]["Memory"] == 1 << 30


def test_the_image_is_the_users_else_the_hosts() -> None:
    assert made(image="lab:1")["Image"] == "lab:1"
    assert made(DockerOptions(image="own"))["Image"] == "own"


def test_volumes_are_named_by_owner_and_folders_of_the_host_are_bound() -> None:
    volumes = {"home-{username}": "{home}", "/nfs/{owner}": "/data", "/sets": {"bind": "/sets", "mode": "ro"}}
    mounts = made(DockerOptions(volumes=volumes), owner="Ann@Lab")["HostConfig"]["Mounts"]
    assert mounts[0]["Source"].startswith("home-ann-lab---")
    assert [(m["Type"], m["Target"], m["ReadOnly"]) for m in mounts] == [
        ("volume", "/home/jovyan", False),
        ("bind", "/data", False),
        ("bind", "/sets", True),
        ("bind", "/run/nbos", True),
    ]
    assert mounts[1]["Source"] == "/nfs/Ann@Lab"


@pytest.mark.parametrize("owner", ["../root", "a/b", ".ssh", "a..b", ""])
def test_no_owner_leads_to_another_place(owner: str) -> None:
    with pytest.raises(RuntimeFailed, match="cannot stand in the path"):
        fill("/nfs/{owner}", owner)


def test_different_owners_never_share_a_name() -> None:
    owners = ["ann", "Ann", "a.nn", "a nn", "a/nn", "ann---x", "", "ä", "ö", "x" * 80, "x" * 81, safe_name("Ann")]
    assert len({safe_name(owner) for owner in owners}) == len(owners)
    assert safe_name("ann") == "ann"


def test_a_home_that_nothing_keeps_is_in_memory_and_the_users() -> None:
    tmpfs = made(DockerOptions(volumes={}))["HostConfig"]["Tmpfs"]
    assert "uid=1000,gid=100" in tmpfs["/home/jovyan"]
    assert "/home/jovyan" not in made()["HostConfig"]["Tmpfs"]
    assert "/home/jovyan" not in made(DockerOptions(volumes={"/nfs": "/home"}))["HostConfig"]["Tmpfs"]


def test_it_starts_with_the_check_in_the_notebooks_folder() -> None:
    body = made(cwd="/home/jovyan/work")
    assert body["Entrypoint"] == ["python3", "/run/nbos/start.py", "/home/jovyan/work"]
    assert body["Cmd"][:5] == ["python3", "-m", "nbos_kernel", "--nbos-socket", "/run/nbos/s"]
    assert made()["Entrypoint"][2] == "/home/jovyan"


def test_labels_say_whose_it_is() -> None:
    labels = made()["Labels"]
    assert labels["nbos.cluster"] == "lab"
    assert (labels["nbos.kernel"], labels["nbos.replica"], labels["nbos.incarnation"]) == ("0123456789abcdef", "2", "3")
    assert labels["nbos.run-dir"] == "/var/lib/nbos"


def test_real_gpus_are_asked_for_and_simulated_ones_are_not() -> None:
    played = simulated("gpu-1", 2, "H100", 66, 1 << 36)
    assert device_requests("auto", played) == []
    assert device_requests("none", [GPU]) == []
    assert device_requests("auto", [*played, GPU])[0]["DeviceIDs"] == ["GPU-1"]
    assert device_requests("cdi", [GPU]) == [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=3"]}]


# -- options ----------------------------------------------------------------------------------------------------------


def test_options_are_read_with_their_units() -> None:
    config = Config({"Docker": {"memory": "2G", "shm": "64M", "deny": ["10.0.0.0/8"], "user": "owner"}})
    options = Docker(config=config).options()
    assert (options.memory, options.shm, options.deny, options.user) == (2 << 30, 64 << 20, ("10.0.0.0/8",), "owner")


@pytest.mark.parametrize(
    ("option", "value"), [("user", "ann"), ("memory", "much"), ("deny", ["etcd.lab"]), ("allow", ["10.0.0.1:x"])]
)
def test_a_wrong_option_is_refused_when_the_daemon_starts(option: str, value: Any) -> None:
    with pytest.raises(TraitError, match=r"user|size|network"):
        Docker(config=Config({"Docker": {option: value}}))


def test_the_example_of_a_hosts_configuration_is_one() -> None:
    app = GPUDaemon()
    app.initialize(["--config", str(ROOT / "configs" / "gpu_daemon.py")])
    assert app.runtime == "docker"
    assert set(app.config["GPUDaemon"]) <= set(app.traits(config=True))
    assert set(app.config["Docker"]) <= set(Docker.class_traits(config=True))
    assert Docker(parent=app).options().memory == 16 << 30


# -- the walls --------------------------------------------------------------------------------------------------------


def test_the_host_is_closed_and_allowed_places_come_before_denied_ones() -> None:
    lines = walls.rules("nb1", ("10.0.0.53:53",), ("10.0.0.0/8",), internet=True).splitlines()
    out = [line for line in lines if line.startswith("-A NBOS-nb1-O")]
    here = [line for line in lines if line.startswith("-A NBOS-nb1-H")]
    assert "ESTABLISHED" in out[0]
    assert "-d 10.0.0.53/32 -p tcp --dport 53 -j RETURN" in out[1]
    assert "-o nb1 -j REJECT" in out[3]
    assert "-d 10.0.0.0/8 -j REJECT" in out[4]
    assert out[-1].endswith("-j RETURN")
    assert "-j REJECT" in here[-1]
    assert " -d " not in here[-1]


def test_without_internet_nothing_leaves() -> None:
    assert "-A NBOS-nb1-O -j REJECT" in walls.rules("nb1", (), (), internet=False)


def test_names_of_chains_and_interfaces_are_short_enough_for_linux() -> None:
    interface = Site("a-cluster-with-a-long-name", "a-host-with-a-long-name.example.org", "/x").interface
    assert len(interface) <= 15
    assert all(len(chain) <= 28 for chain in walls.chains(interface))


# -- pulls ------------------------------------------------------------------------------------------------------------


def test_a_pull_tells_how_far_it_is() -> None:
    pull = PullProgress("lab:1")
    assert pull.text == "this host is getting the image lab:1: asking its registry"
    pull.take({"id": "a", "status": "Downloading", "progressDetail": {"current": 10_000_000, "total": 40_000_000}})
    pull.take({"id": "b", "status": "Downloading", "progressDetail": {"current": 1_000_000, "total": 2_000_000}})
    assert pull.text.endswith("11 of 42 MB so far")
    for layer in "ab":
        pull.take({"id": layer, "status": "Download complete"})
    assert pull.text.endswith("being unpacked")
    assert not pull.error
    pull.take({"error": "no room"})
    assert pull.error == "no room"


# -- the image --------------------------------------------------------------------------------------------------------


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", container_check.__file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")


def test_a_python_without_our_packages_is_told_what_it_lacks(tmp_path: Path) -> None:
    done = check(str(tmp_path), sys.executable, HOME=str(tmp_path))  # -S: no site-packages
    assert done.returncode == container_check.UNFIT
    assert "NBOS: " in done.stdout
    assert "lacks blake3, cloudpickle, ipykernel" in done.stdout


def test_the_check_is_readable_for_an_old_python() -> None:
    import ast

    ast.parse(Path(container_check.__file__).read_text(), feature_version=(3, 6))


def test_a_folder_that_is_gone_leads_to_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    container_check.go_to(str(tmp_path / "gone"))
    assert Path.cwd() == home


@pytest.mark.parametrize(
    ("mine", "theirs", "state", "differ"),
    [
        ("3.12.1", "3.11.9", "ready", True),
        ("3.11.2", "3.11.9", "ready", False),
        ("3.12.1", "3.11.9", "starting", False),
        ("3.12.1", "", "ready", False),
    ],
)
def test_a_replica_with_another_minor_version_of_python_is_found_out(
    mine: str, theirs: str, state: Any, differ: bool
) -> None:
    view = KernelView("k")
    view.replicas[1] = ReplicaRecord(index=1, host="b", state=state, python=theirs)
    said = other_python(view, 0, mine)
    assert bool(said) == differ
    if differ:
        assert "3.12.1" in said
        assert "host b has Python 3.11.9" in said


# -- ends -------------------------------------------------------------------------------------------------------------


def ended(code: int, oom: bool, limit: int = 0) -> dict[str, Any]:
    return {"State": {"ExitCode": code, "OOMKilled": oom}, "HostConfig": {"Memory": limit}}


def test_an_exit_status_tells_the_signal() -> None:
    assert plain_end(139) == Exit(signal=11)
    assert plain_end(0) == Exit(0)
    assert plain_end(3) is None
    assert plain_end(255) is None


def test_out_of_memory_is_told_with_the_limit_and_only_when_the_replica_ended_of_it() -> None:
    assert "all of its 2.00 GiB memory; use less" in str(memory_end(ended(137, True, 2 << 30)))
    assert memory_end(ended(137, False, 2 << 30)) is None
    assert memory_end(ended(139, True, 2 << 30)) is None


def test_the_last_line_of_a_failed_start_is_told() -> None:
    assert str(told_end(1, ["a", "OSError: no room"], "lab:1")) == "ended with exit status 1: OSError: no room"
    assert str(told_end(1, [], "lab:1")) == "ended with exit status 1"
    assert "lab:1 cannot run a kernel: it lacks x" in str(told_end(78, ["NBOS: it lacks x"], "lab:1"))
    assert "has no Python" in str(told_end(127, ["[FATAL tini (7)] exec python3 failed"], "lab:1"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('exec: "python3": executable file not found in $PATH', "has no Python"),
        ('could not select device driver "nvidia"', "nvidia-container-toolkit"),
        ("invalid mount config: bind source path does not exist: /nfs/ann", "Docker.volumes"),
        ("something else", "something else"),
    ],
)
def test_a_start_that_docker_refused_names_the_way_out(text: str, told: str) -> None:
    assert told in failed_start(text, "lab:1")
