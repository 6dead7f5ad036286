"""What is said about metrics is true: the page, the dashboard and the code name the same ones; options are checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from traitlets import TraitError
from traitlets.config import Config

from gpu_daemon.ledger import Ledger, Request
from gpu_daemon.metrics.config import Metrics, MetricsError
from gpu_daemon.metrics.exposition import Now, reason_of
from gpu_daemon.metrics.meters import LONG, QUICK, STORING, Meters
from nbos_cluster.records import Device, DeviceShare, GrantRecord, Move, Resources
from nbos_spawner.gateway.copy import ClusterCopy
from nbos_spawner.gateway.metrics import CALLS, MOVES, GatewayMetrics

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
DASHBOARD = json.loads((ROOT / "configs" / "grafana" / "nbos.json").read_text())


def documented(section: str) -> dict[str, tuple[str, set[str]]]:
    """Kind and labels of each metric that the page's section `section` lists."""
    part = re.search(rf"^## `{section}`$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert part is not None, f"docs/metrics.md has no section {section}"
    rows = re.findall(r"^\| `(nbos_\w+)` \| (\w+)(?: \(\w+\))? \| ([^|]*)\|", part.group(1), re.M)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def exported(registry: CollectorRegistry) -> dict[str, tuple[str, set[str]]]:
    """Kind and labels of each metric, as Prometheus sees them."""
    found = {}
    for family in registry.collect():
        if family.name.startswith("nbos_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            found[name] = (family.type, set(_labels(family, registry)))
    return found


def _labels(family: Any, registry: CollectorRegistry) -> tuple[str, ...]:
    """The names of the labels also of a metric that nothing was told of yet."""
    collector = registry._names_to_collectors.get(family.name)
    return tuple(getattr(collector, "_labelnames", ()) or getattr(family, "_labelnames", ()))


def of_daemon(owners: bool = False) -> CollectorRegistry:
    meters = Meters(owners)
    meters.registry.register(Now(owners))
    return meters.registry


def of_gateway() -> CollectorRegistry:
    return GatewayMetrics(ClusterCopy(), lambda: True).registry


def test_the_page_lists_what_daemon_and_gateway_export() -> None:
    assert documented("gpu_daemon") == exported(of_daemon())
    assert documented("gateway") == exported(of_gateway())


def test_the_page_states_the_buckets() -> None:
    said = dict(re.findall(r"^\| (\w+) \| ([\d., ]+) \|", PAGE, re.M))
    buckets = {"quick": QUICK, "storing": STORING, "long": LONG, "calls": CALLS, "moves": MOVES}
    assert {name: tuple(map(float, text.split(","))) for name, text in said.items()} == buckets


def test_the_dashboard_asks_for_nothing_that_is_not_there() -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    queries += [str(variable.get("query", "")) for variable in DASHBOARD["templating"]["list"]]
    there: dict[str, set[str]] = {}
    for registry in (of_daemon(), of_gateway()):
        for name, (kind, labels) in exported(registry).items():
            series = [f"{name}_{part}" for part in ("bucket", "sum", "count")] if kind == "histogram" else [name]
            there |= {one: labels | ({"le"} if one.endswith("_bucket") else set()) for one in series}
    asked = {name for query in queries for name in re.findall(r"\bnbos_\w+", query)}
    assert asked
    assert asked <= set(there)
    known = {"instance", "job", *set().union(*there.values())}
    for query in queries:
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert {label.strip() for label in group.split(",")} <= known, query
    assert len(asked) > 25, "the dashboard shows most of what there is"


def test_every_panel_of_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        cells |= mine
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]
            assert panel["description"]


def test_the_sample_configuration_asks_where_the_page_says() -> None:
    config = yaml.safe_load((ROOT / "configs" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert set(jobs) == {"nbos-daemons", "nbos-gateway"}
    assert jobs["nbos-gateway"]["metrics_path"] == "/services/nbos/metrics"
    assert jobs["nbos-daemons"]["metrics_path"] == "/metrics"
    for job in jobs.values():
        assert job.get("authorization") or job["tls_config"]["cert_file"], "all that listens asks who comes"


def grant(owner: str = "ann", whole: bool = False) -> GrantRecord:
    share = DeviceShare(uuid="u", index=0, model="m", tpcs=(0, 1), memory=1, whole=whole, kind="simulated")
    return GrantRecord(grant="g", host="h", owner=owner, kernel="k", replica=0, n=1, shares=(share,))


def value(meters: Meters, name: str, **labels: str) -> float | None:
    return meters.registry.get_sample_value(name, labels)


def test_users_are_named_only_where_that_is_asked_for() -> None:
    plain, named = Meters(), Meters(owners=True)
    for meters in (plain, named):
        meters.granted(grant(), 3.0)
        meters.given_back(grant("bob", whole=True), 7.0)
    assert value(plain, "nbos_grants_total", kind="slice") == 1
    assert value(plain, "nbos_gpu_held_seconds_sum", kind="device") == 7
    assert value(named, "nbos_gpu_wait_seconds_sum", kind="slice", owner="ann") == 3
    assert value(named, "nbos_gpu_held_seconds_sum", kind="device", owner="bob") == 7
    assert exported(of_daemon(owners=True))["nbos_waiting_cells"][1] == {"reason", "owner"}


def test_what_a_cell_waits_for_is_room_or_what_is_kept_for_others() -> None:
    device = Device(uuid="u", index=0, model="m", tpcs=8, memory=1 << 30, kind="simulated")
    ledger = Ledger("h", [device])
    assert reason_of(ledger, Resources(tpcs=4)) == "kept"
    ledger.reserve(Request("g", "ann", "k", 0, 1, Resources(tpcs=6)))
    assert reason_of(ledger, Resources(tpcs=4)) == "busy"


def options(**values: Any) -> Metrics:
    return Metrics(config=Config(Metrics=values))


def files(folder: Path, **contents: str) -> dict[str, str]:
    for name, text in contents.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    return {name: str(folder / name) for name in contents}


def test_an_endpoint_that_is_not_guarded_is_refused_with_the_way_out(tmp_path: Path) -> None:
    good = files(tmp_path, token_file="x" * 32, cert="c", key="k", client_ca="a")
    token = {"token_file": good["token_file"]}
    tls = {"cert": good["cert"], "key": good["key"]}
    ca = {"client_ca": good["client_ca"]}
    assert options().endpoint() is None
    local = options(listen="127.0.0.1:9755", **token).endpoint()
    assert local is not None
    assert (local.address, local.port, local.clients) == ("127.0.0.1", 9755, ("reader",))
    assert options(listen="[::]:9755", **token, **tls).endpoint() is not None
    assert options(listen="10.0.0.1:9755", **tls, **ca).endpoint() is not None
    for wrong, says in [
        ({"listen": "127.0.0.1:9755"}, "would let anybody ask"),
        ({"listen": "127.0.0.1:9755", **tls}, "would let anybody ask"),
        ({"listen": "10.0.0.1:9755", **token}, "travel in clear"),
        ({"listen": "[::]:9755", **token}, "travel in clear"),
        ({"listen": "127.0.0.1:9755", **ca}, "set Metrics.cert and Metrics.key"),
        ({"listen": "127.0.0.1:9755", **token, "cert": good["cert"]}, "set both, or none"),
        ({"listen": "127.0.0.1:9755", "token_file": "/nowhere"}, "is not a file"),
    ]:
        with pytest.raises(MetricsError, match=says):
            options(**wrong).endpoint()
    for where in ("localhost:9755", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:70000", ":9755"):
        with pytest.raises(TraitError, match=r"such as 127\.0\.0\.1:9755"):
            options(listen=where)


def test_a_token_that_others_can_read_or_guess_is_refused(tmp_path: Path) -> None:
    names = files(tmp_path, short="x" * 15, open="x" * 32)
    (tmp_path / "open").chmod(0o640)
    for name, says in [("short", "at least 16"), ("open", "chmod 600")]:
        with pytest.raises(MetricsError, match=says):
            options(listen="127.0.0.1:9755", token_file=names[name]).endpoint()


def test_a_move_is_counted_with_its_time_by_how_it_ended() -> None:
    metrics = GatewayMetrics(ClusterCopy(), lambda: True)
    move = Move(source=0, target=3, from_host="a", to_host="b", why="drain", since=1000.0)
    metrics.moved(move, "done", 1007.0)
    metrics.moved(move, "undone", 990.0)  # a host's clock that is behind

    def told(part: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"nbos_gateway_move_seconds_{part}", {"why": "drain", **labels})

    assert (told("count", ended="done"), told("sum", ended="done")) == (1, 7)
    assert told("bucket", ended="done", le="5.0") == 0
    assert (told("count", ended="undone"), told("sum", ended="undone")) == (1, 0)
