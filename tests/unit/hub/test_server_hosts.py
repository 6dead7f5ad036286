"""On which host a user's server runs, and how the hub may reach its Engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traitlets import TraitError

from nbos_cluster.placement import NoRoom, ServerHost, place_server
from nbos_spawner.docker_spawner import NBOSDockerSpawner
from nbos_spawner.engines import EnginesError, read_engines

HOSTS = st.lists(
    st.builds(
        ServerHost,
        name=st.sampled_from("abcdef"),
        draining=st.booleans(),
        cpus=st.integers(0, 64),
        replicas=st.integers(0, 50),
        servers=st.integers(0, 50),
    ),
    unique_by=lambda host: host.name,
)


@given(hosts=HOSTS, silent=st.frozensets(st.sampled_from("abcdef")))
def test_the_least_loaded_host_that_may_take_it_is_taken(hosts: list[ServerHost], silent: frozenset[str]) -> None:
    may = {host.name: host for host in hosts if not host.draining and host.name not in silent}
    if not may:
        with pytest.raises(NoRoom, match="no host can take the server"):
            place_server(hosts, silent)
        return
    chosen = may[place_server(hosts, silent)]
    assert place_server(reversed(hosts), silent) == chosen.name

    def load(host: ServerHost) -> float:
        return (host.replicas + host.servers) / max(1, host.cpus)

    assert load(chosen) == min(map(load, may.values()))


def test_why_no_host_takes_it_is_told() -> None:
    with pytest.raises(NoRoom, match="a drains; b does not answer"):
        place_server([ServerHost("b"), ServerHost("a", draining=True)], {"b"})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"url": "tcp://10.0.0.1:2375"}, "name ca, cert and key"),
        ({"url": "http://10.0.0.1"}, "must begin with tcp:// or unix://"),
        ({"url": "tcp://h:1", "ca": "/no/ca", "cert": "/no/cert", "key": "/no/key"}, "there is no file /no/ca"),
        ({"url": "unix:///s", "port": "3"}, "must be a table of url, address, ca, cert, key"),
    ],
)
def test_a_line_to_an_engine_is_guarded_or_the_hub_does_not_start(entry: dict[str, str], words: str) -> None:
    with pytest.raises(EnginesError, match=words):
        read_engines({"gpu-1": entry})
    with pytest.raises(TraitError, match=words):
        NBOSDockerSpawner(hosts={"gpu-1": entry})


def test_ports_are_published_where_the_url_leads_unless_it_is_said(tmp_path: Path) -> None:
    files = {}
    for name in ("ca", "cert", "key"):
        (tmp_path / name).touch()
        files[name] = str(tmp_path / name)
    table: dict[str, Any] = {
        "a": {"url": "tcp://10.0.0.1:2376", **files},
        "b": {"url": "unix:///b", "address": "10.0.0.2"},
    }
    assert {name: engine.address for name, engine in read_engines(table).items()} == {"a": "10.0.0.1", "b": "10.0.0.2"}


async def test_without_hosts_a_server_is_the_hub_machines() -> None:
    one = NBOSDockerSpawner()
    assert one.hosts == {}
    assert one.host == ""
