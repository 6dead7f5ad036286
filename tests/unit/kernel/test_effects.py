"""Packages that a cell installs are named in the entry, and installed on a standby that lacks them."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from nbos_kernel import effects


def test_new_versions_are_found_when_site_packages_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"a": "1"}
    marks = [(("site", 1),)]
    monkeypatch.setattr(effects, "_versions", lambda: dict(versions))
    monkeypatch.setattr(effects, "_site_marks", lambda: marks[0])
    watcher = effects.Watcher()
    watcher.prepare()
    versions["b"] = "2"
    assert "packages" not in watcher.changes()
    marks[0] = (("site", 2),)
    assert watcher.changes()["packages"] == {"b": "2"}
    assert "packages" not in watcher.changes()


def test_a_standby_installs_what_is_missing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Any] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    monkeypatch.setattr(effects, "_versions", lambda: {"a": "1"})
    monkeypatch.setattr(subprocess, "run", run)
    assert effects.install({"a": "1"}) == {}
    assert effects.install({"a": "1", "b": "2"}) == {"%pip": "b==2: ERROR: no network"}
    assert commands[0][-1] == "b==2"


def test_a_directory_that_is_not_there_is_said() -> None:
    assert "/not/there" in effects.Watcher().apply({"cwd": "/not/there"})["%cd"]
