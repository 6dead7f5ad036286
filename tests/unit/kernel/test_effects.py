"""Packages that a cell installs are named in the entry, and installed on a standby that lacks them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return monkeypatch


def test_what_is_no_text_or_too_long_is_left_and_named(surroundings: pytest.MonkeyPatch) -> None:
    watcher = effects.Watcher()
    surroundings.setenv("RAW", os.fsdecode(b"caf\xe9"))
    surroundings.setenv("LONG", "x" * 100_000)
    surroundings.setenv("N" * 5000, "1")
    surroundings.setenv("FINE", "caf\u00e9")
    sys.path += ["/plain", os.fsdecode(b"/caf\xe9")]
    found = watcher.changes()
    assert found["environ"] == {"FINE": "caf\u00e9"}
    assert found["sys_path"][-1] == "/plain"
    json.dumps(watcher.left, ensure_ascii=False).encode()
    assert {"%env RAW", "%env LONG", "sys.path"} < set(watcher.left)
    assert len(watcher.left) == 4
    surroundings.setenv("RAW", "text")
    assert effects.names_of(watcher.changes()) == ["%env RAW"]
    assert watcher.left == {}
