"""The drop-in configuration: what it adds to a JupyterHub, alone and beside a site's own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jupyterhub.services.service import Service
from traitlets.config.loader import PyFileConfigLoader

from nbos.places import drop_in_config
from nbos_spawner.scopes import ACCESS, KERNELS
from nbos_spawner.spawner import SERVER_SCOPES, NBOSSpawner


def loaded(tmp_path: Path, before: str = "", after: str = "") -> Any:
    """A site's configuration file that loads ours, as JupyterHub reads it."""
    file = tmp_path / "site_config.py"
    file.write_text(f"c = get_config()\n{before}\nload_subconfig({str(drop_in_config())!r})\n{after}\n")
    return PyFileConfigLoader(file.name, str(tmp_path)).load_config()


def services(config: Any) -> list[dict[str, Any]]:
    found = config.JupyterHub.services
    return list(found.get_value([]) if hasattr(found, "get_value") else found)


def test_alone_it_gives_spawner_service_and_roles(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert config.JupyterHub.spawner_class == "nbos_spawner.spawner.NBOSSpawner"
    assert [service["name"] for service in services(config)] == ["nbos"]


def test_beside_a_sites_own_services_it_adds_one(tmp_path: Path) -> None:
    own = "c.JupyterHub.services.append({'name': 'culler'})"
    assert [s["name"] for s in services(loaded(tmp_path, before=own))] == ["culler", "nbos"]
    assert [s["name"] for s in services(loaded(tmp_path, after=own))] == ["nbos", "culler"]


def test_beside_a_sites_own_scopes_it_adds_one(tmp_path: Path) -> None:
    own = "c.JupyterHub.custom_scopes = {'custom:lab': {'description': 'x'}}"
    found = loaded(tmp_path, before=own).JupyterHub.custom_scopes
    assert set(found) == {"custom:lab", KERNELS}
    alone = loaded(tmp_path, after="c.JupyterHub.custom_scopes.update({'custom:lab': {'description': 'x'}})")
    assert set(alone.JupyterHub.custom_scopes.get_value({})) == {"custom:lab", KERNELS}


def test_every_user_gets_the_scopes_that_a_server_needs(tmp_path: Path) -> None:
    roles = loaded(tmp_path).JupyterHub.load_roles.get_value([])
    user = next(set(role["scopes"]) for role in roles if role["name"] == "user")
    assert {ACCESS, f"{KERNELS}!user"} <= user & set(SERVER_SCOPES)


def test_the_service_is_one_jupyterhub_takes(tmp_path: Path) -> None:
    service = services(loaded(tmp_path))[0]
    known = Service.class_traits(input=True)
    assert not set(service) - set(known)


def test_gateway_and_spawner_have_the_same_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBOS_LIMITS", '{"default": {"gpus": 1}}')
    config = loaded(tmp_path)
    assert config.NBOSSpawnerMixin.limits == json.loads(services(config)[0]["environment"]["NBOS_LIMITS"])


def test_only_the_gateway_is_given_what_reaches_etcd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBOS_ETCD_KEY", "/secret/etcd.key")
    config = loaded(tmp_path)
    assert services(config)[0]["environment"]["NBOS_ETCD_KEY"] == "/secret/etcd.key"
    assert "etcd" not in str([config.NBOSSpawner, config.NBOSSpawnerMixin]).lower()
    assert "NBOS_ETCD_KEY" not in NBOSSpawner().env_keep


def test_a_servers_token_may_reach_nbos_and_little_else() -> None:
    assert NBOSSpawner().server_token_scopes == list(SERVER_SCOPES)


def test_wrong_limits_end_the_start_with_the_entry_named() -> None:
    with pytest.raises(ValueError, match=r"default\.gpu"):
        NBOSSpawner(limits={"default": {"gpu": 1}})
