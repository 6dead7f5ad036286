"""The spawner's Docker form: what its container is made of, and whose word counts for what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from dockerspawner import DockerSpawner
from traitlets.config import Config

from nbos_spawner.docker_spawner import NBOSDockerSpawner


def spawner(**options: Any) -> NBOSDockerSpawner:
    user = SimpleNamespace(name="ada", groups=[SimpleNamespace(name="lab")])
    return NBOSDockerSpawner(user=user, **options)


async def test_the_container_gets_the_limits_of_the_users_group_as_they_are_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def start(self: Any) -> tuple[str, int]:
        return "", 0

    monkeypatch.setattr(DockerSpawner, "start", start)
    one = spawner(limits={"groups": {"lab": {"server_memory": "2G", "server_cpus": 2}}})
    await one.start()
    assert (one.mem_limit, one.cpu_limit) == (2 << 30, 2.0)
    one.user.groups = []
    await one.start()
    assert not one.mem_limit
    assert not one.cpu_limit


async def test_a_site_s_own_bound_holds_where_the_limits_name_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(self: Any) -> tuple[str, int]:
        return "", 0

    monkeypatch.setattr(DockerSpawner, "start", start)
    one = spawner(mem_limit="3G", cpu_limit=1.5)
    await one.start()
    assert (one.mem_limit, one.cpu_limit) == (3 << 30, 1.5)


def test_the_container_gains_no_rights() -> None:
    host = spawner(pids_limit=100).extra_host_config
    assert host["cap_drop"] == ["ALL"]
    assert host["security_opt"] == ["no-new-privileges"]
    assert host["pids_limit"] == 100


async def test_the_users_image_is_the_kernels_and_not_the_servers() -> None:
    one = spawner(image="lab/server:1", allowed_images=["lab/other"])
    assert await one.check_allowed("lab/other") == "lab/server:1"


def test_options_for_every_form_reach_this_one() -> None:
    config = Config({"NBOSSpawnerMixin": {"gateway_url": "http://g/services/nbos/"}})
    assert spawner(config=config).gateway_url == "http://g/services/nbos/"
