"""The parts of the `nbos` command that need no process: etcd's choice, ports, state, back-off, doctor, table."""

import json
import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from nbos import doctor, status
from nbos.cli import parser, up_options
from nbos.etcdserver import EtcdChoice, NoEtcd, choose, etcd_command, parse_version
from nbos.layout import Layout, UpOptions
from nbos.places import child_environment, drop_in_config
from nbos.ports import PortInUse, check_public, keep_ports
from nbos.state import SOCKET_ROOM, StateDir, StateError
from nbos.supervisor import STEADY, Backoff, describe
from nbos_cluster.records import Device
from nbos_spawner.gateway.auth import Caller
from nbos_spawner.gateway.config import ConfigError, read_config
from nbos_spawner.gateway.models import status_model

from .cluster_data import filled, spec

GOOD, BAD = EtcdChoice("/usr/bin/etcd", (3, 4, 23)), EtcdChoice("/v/bin/etcd", (3, 5, 1))


def layout(tmp_path: Path, devices: tuple[Device, ...] = ()) -> Layout:
    ports = {"etcd": 1, "etcd_peer": 2, "hub": 3, "proxy_api": 4, "gateway": 5}
    return Layout(StateDir.at(tmp_path), UpOptions(port=8123), ports, GOOD, devices)


def test_an_etcd_that_may_lose_data_is_taken_only_when_there_is_no_other() -> None:
    assert choose([BAD, GOOD]) == GOOD
    assert choose([BAD]) == BAD
    assert "3.5.1" in BAD.warning
    assert not GOOD.warning


def test_without_etcd_the_way_out_is_said() -> None:
    with pytest.raises(NoEtcd, match="pip install"):
        choose([])


def test_the_version_is_read_from_etcds_own_words() -> None:
    assert parse_version("etcd Version: 3.4.23\nGit SHA: x") == (3, 4, 23)
    assert parse_version("what?") is None


def test_etcd_listens_on_this_machine_and_wants_certificates() -> None:
    command = etcd_command(GOOD, Path("/d"), Path("/t"), 1, 2)
    assert "--client-cert-auth" in command
    assert "--peer-client-cert-auth" in command
    assert all("0.0.0.0" not in word and "http://" not in word for word in command)


def test_a_process_that_keeps_dying_waits_longer_each_time_up_to_a_bound() -> None:
    backoff = Backoff()
    pauses = [backoff.died(lived=0.1) for _ in range(12)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 10.0


def test_a_process_that_lived_long_is_started_again_at_once() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.died(lived=0.1)
    assert backoff.died(lived=STEADY) == 0.1


def test_how_a_process_ended_is_said_in_words() -> None:
    assert [describe(-9), describe(1)] == ["killed by SIGKILL", "exit code 1"]


def test_a_port_in_use_is_named_with_who_has_it_and_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} .* in use by process .* --port"):
            check_public("127.0.0.1", port)


def test_ports_are_kept_between_runs_and_replaced_when_taken(tmp_path: Path) -> None:
    file = tmp_path / "ports.json"
    first = keep_ports(file, ["a", "b"])
    assert keep_ports(file, ["a", "b"]) == first
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first["a"]))
        taken.listen(1)
        again = keep_ports(file, ["a", "b"])
    assert again["a"] != first["a"]
    assert again["b"] == first["b"]


def test_only_one_nbos_up_works_on_a_state_directory(tmp_path: Path) -> None:
    state = StateDir.at(tmp_path / "s")
    state.create()
    with state.lock(), pytest.raises(StateError, match="already running"):
        state.lock()
    assert not state.in_use()


def test_secrets_are_kept_and_for_this_user_alone(tmp_path: Path) -> None:
    state = StateDir.at(tmp_path / "s")
    state.create()
    secret = state.secret(state.token_file, 24)
    assert state.secret(state.token_file, 24) == secret
    assert stat.S_IMODE(state.token_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_a_long_state_directory_keeps_its_sockets_elsewhere(tmp_path: Path) -> None:
    near, far = StateDir.at("/tmp/s"), StateDir.at("/tmp/" + "x" * SOCKET_ROOM)
    assert near.run_dir("host-1").is_relative_to(near.path)
    assert not far.run_dir("host-1").is_relative_to(far.path)
    assert len(str(far.run_dir("host-1"))) <= SOCKET_ROOM


def test_no_real_device_belongs_to_two_hosts(tmp_path: Path) -> None:
    found = tuple(Device(uuid=f"GPU-{i}", index=i, model="H", tpcs=1, memory=1, kind="nvml") for i in range(5))
    one = layout(tmp_path, found)
    dealt = [uuid for host in one.hosts for uuid in one.devices_of(host)]
    assert sorted(dealt) == [device.uuid for device in found]


def test_what_nbos_writes_about_itself_holds_no_secret(tmp_path: Path) -> None:
    one = layout(tmp_path)
    one.state.create()
    one.write_settings()
    text = json.dumps(one.info(pid=1))
    for file in (one.state.password_file, one.state.admin_password_file, one.state.token_file):
        assert file.read_text().strip() not in text


def test_no_command_line_holds_a_secret(tmp_path: Path) -> None:
    one = layout(tmp_path)
    one.state.create()
    one.write_settings()
    secret = one.state.secret(one.state.path / "proxy-token", 24)
    assert all(secret not in " ".join(child.command) for child in one.children().values())


def test_children_inherit_nothing_of_another_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "t")
    assert "JUPYTERHUB_API_TOKEN" not in child_environment()


def test_the_drop_in_configuration_is_found() -> None:
    assert "spawner_class" in drop_in_config().read_text()


@pytest.mark.parametrize("words", [["--port", "0"], ["--hosts", "x"], ["--admin", "a b"], ["--gpu-memory", "much"]])
def test_wrong_options_of_up_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["up", *words])
    assert "must be" in capsys.readouterr().err or words[0] == "--gpu-memory"


def test_doctor_says_what_to_install() -> None:
    finding = doctor.check_packages({"jupyterhub": "hub", "pynvml": "daemon"}, lambda name: name != "pynvml")
    assert finding.level == "bad"
    assert "nbos[daemon]" in finding.text


def test_doctor_knows_old_pythons() -> None:
    assert doctor.check_python((3, 10, 1)).level == "bad"
    assert doctor.check_python((3, 12, 0)).level == "good"


def test_doctor_finds_secrets_that_others_may_read(tmp_path: Path) -> None:
    state = StateDir.at(tmp_path / "s")
    state.create()
    state.secret(state.token_file, 24)
    assert doctor.check_state_dir(state).level != "bad"
    state.token_file.chmod(0o644)
    assert "chmod 600" in doctor.check_state_dir(state).text
    state.path.chmod(0o755)
    assert "chmod 700" in doctor.check_state_dir(state).text


def test_doctor_does_not_need_docker(tmp_path: Path) -> None:
    assert doctor.check_docker(None, tmp_path / "no").level == "note"


def test_doctor_says_what_is_wrong_with_docker(tmp_path: Path) -> None:
    absent = doctor.check_docker("/usr/bin/docker", tmp_path / "absent").text
    assert "does not run" in absent
    assert "not yours" not in absent
    left_behind = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(left_behind))
    assert "nobody listens" in doctor.check_docker("/usr/bin/docker", left_behind).text


def test_the_limits_of_a_lab_come_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "limits.json"
    table.write_text('{"default": {"gpus": 1, "replica_memory": "2G"}, "users": {"ada": {"gpus": 2}}}')
    options = parser().parse_args(["up", "--limits", str(table), "--memory-limit", "600M"])
    chosen = up_options(options)
    assert chosen.limits == {"default": {"gpus": 1, "replica_memory": 600 << 20}, "users": {"ada": {"gpus": 2}}}
    assert up_options(parser().parse_args(["up"])).limits == {}
    table.write_text('{"default": {"gpu": 1}}')
    with pytest.raises(SystemExit):
        parser().parse_args(["up", "--limits", str(table)])
    assert "default.gpu is unknown" in capsys.readouterr().err


def test_the_limits_reach_the_hub_and_the_gateway(tmp_path: Path) -> None:
    limits = {"default": {"replica_memory": 1 << 30}}
    bounded = replace(layout(tmp_path), options=UpOptions(limits=limits))
    bounded.state.create()
    assert json.loads(bounded.children()["hub"].env["NBOS_LIMITS"]) == limits


def test_warm_replicas_of_the_command_line_reach_the_daemons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> dict[str, object]:
        plan = replace(layout(tmp_path), options=up_options(parser().parse_args(["up", *words])))
        return dict(plan.daemon_config("host-1")["Warm"])

    assert told() == {"keep": 1, "most": 4, "modules": [], "learn": True}
    assert told("--no-learning")["learn"] is False
    assert told("--warm", "3", "--preload", "numpy,torch.nn") == {
        "keep": 3, "most": 6, "modules": ["numpy", "torch.nn"], "learn": True
    }  # fmt: skip
    assert told("--warm", "0") == {"policy": "off"}
    with pytest.raises(SystemExit):
        told("--preload", "numpy;torch")
    assert "commas" in capsys.readouterr().err


def test_status_of_nothing_says_how_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.status(StateDir.at(tmp_path), as_json=False) == 1
    assert "nbos up" in capsys.readouterr().err


def test_the_table_names_hosts_kernels_and_replicas() -> None:
    found = status_model(filled(spec("k1", "ada", "a", "b")), Caller("root", "user", admin=True))
    found["hosts"][0]["warm"] = [{"image": "", "ready": 0, "wanted": 2, "note": "memory is short"}]
    found["hosts"][0]["warm"][0] |= {"modules": ["numpy", "pandas"], "refused": {"loud": "it prints something"}}
    text = "\n".join(status.table({"hub_url": "http://h/", **found}))
    for words in (
        "kept warm on a: 0 of 2 replicas: memory is short; imported ahead: numpy, pandas",
        "not imported ahead there: loud: it prints something",
        "H100",
        "kernel k1  owner ada  epoch 1  last committed 0",
        "missing",
        "standby",
    ):
        assert words in text
    (kernel,) = found["kernels"]
    kernel["last"] = 7
    for member, applied in zip(kernel["members"], (7, 5), strict=True):
        member.update(state="ready", applied=applied)
    text = "\n".join(status.table({"hub_url": "http://h/", **found}))
    assert "5 (2 behind)" in text
    assert text.count("behind") == 1


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "NBOS_ETCD_ENDPOINTS"),
        ({"NBOS_ETCD_ENDPOINTS": "a:1", "NBOS_ETCD_CA": "/nowhere"}, "NBOS_ETCD_CA"),
        ({"NBOS_ETCD_ENDPOINTS": "a:1", "NBOS_LIMITS": "{"}, "NBOS_LIMITS"),
        ({"NBOS_ETCD_ENDPOINTS": "a:1", "NBOS_LIMITS": '{"default": {"x": 1}}'}, "default.x"),
        ({"NBOS_ETCD_ENDPOINTS": "a:1", "NBOS_HOST_GRACE": "long"}, "NBOS_HOST_GRACE"),
    ],
)
def test_the_gateway_names_the_variable_that_is_wrong(env: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_config(env)
