"""What callers see: their own kernels, secrets for owners only, roles, and a page that escapes everything."""

import json

from nbos_cluster import keys
from nbos_cluster.records import LogEntry, QueueTicket, Resources
from nbos_spawner.gateway.auth import Caller
from nbos_spawner.gateway.dashboard import POLICY, render_dashboard
from nbos_spawner.gateway.models import is_ready, kernel_model, may_see, status_model

from .cluster_data import filled, grant, put, replica, spec

ADA, BOB = Caller("ada", "user", admin=False), Caller("bob", "user", admin=False)
ROOT, TOOL = Caller("root", "user", admin=True), Caller("ada", "service", admin=False)
EVIL = '<script>alert("1")</script>'


def test_a_kernel_is_seen_by_its_owner_and_admins_only() -> None:
    one = spec("k", "ada")
    assert [may_see(who, one) for who in (ADA, BOB, ROOT)] == [True, False, True]


def test_a_service_that_is_called_like_a_user_is_not_that_user() -> None:
    assert not may_see(TOOL, spec("k", "ada"))


def test_secrets_are_in_the_model_only_when_asked_for() -> None:
    view = filled(spec("k")).kernel("k")
    assert view is not None
    assert "the-secret" not in json.dumps(kernel_model(view, secrets=False))
    assert kernel_model(view, secrets=True)["connection"]["curve_secretkey"] == "the-secret"


def test_a_replica_nobody_reports_is_missing_and_the_kernel_not_ready() -> None:
    view = filled(spec("k")).kernel("k")
    assert view is not None
    model = kernel_model(view, secrets=False)
    assert [m["state"] for m in model["members"]] == ["missing"] * 3
    assert not is_ready(view)


def test_who_appended_last_is_the_executor() -> None:
    copy = filled(spec("k"))
    for index, name in enumerate("abc"):
        copy.apply_kernels(put(keys.replica("k", index), replica(index, name, applied=1), 2), now=0.0)
    entry = LogEntry(n=1, kind="cell", token=9, replica=2)
    copy.apply_kernels(put(keys.log_entry("k", 1), entry, 3), now=0.0)
    view = copy.kernel("k")
    assert view is not None
    model = kernel_model(view, secrets=False)
    assert [m["role"] for m in model["members"]] == ["standby", "standby", "executor"]
    assert (model["last"], model["executor"]) == (1, 2)


def test_a_replica_of_the_old_incarnation_is_not_ready() -> None:
    copy = filled(spec("k", "ada", "a"))
    copy.apply_kernels(put(keys.replica("k", 0), replica(0, "a", incarnation=0), 2), now=0.0)
    view = copy.kernel("k")
    assert view is not None
    assert not is_ready(view)


def test_a_replica_that_still_runs_where_it_was_moved_from_does_not_count() -> None:
    copy = filled(spec("k", "ada", "b"))
    copy.apply_kernels(put(keys.replica("k", 0), replica(0, "a"), 2), now=0.0)
    view = copy.kernel("k")
    assert view is not None
    assert kernel_model(view, secrets=False)["members"][0]["state"] == "missing"


def test_names_that_are_not_replicated_are_listed_with_the_reason() -> None:
    copy = filled(spec("k"))
    entry = LogEntry(n=1, kind="cell", replica=0, lost={"sock": "a socket"})
    copy.apply_kernels(put(keys.log_entry("k", 1), entry, 3), now=0.0)
    view = copy.kernel("k")
    assert view is not None
    assert kernel_model(view, secrets=False)["lost"] == {"sock": "a socket"}


def test_the_status_shows_others_grants_and_queues_to_admins_only() -> None:
    copy = filled(spec("k1", "ada"), spec("k2", "bob"))
    copy.apply_hosts(put(keys.grant("a", "g2"), grant("a", "bob", "k2")), now=0.0)
    ticket = QueueTicket(
        ticket="t", host="a", owner="bob", kernel="k2", n=1, resources=Resources(gpus=1), position=1, reason="busy"
    )
    copy.apply_queues(put(keys.ticket("a", "t"), ticket))
    mine, all_of_it = status_model(copy, ADA), status_model(copy, ROOT)
    assert [k["kernel_id"] for k in mine["kernels"]] == ["k1"]
    assert not mine["queues"]
    assert not mine["hosts"][0]["grants"]
    assert len(all_of_it["kernels"]) == 2
    assert len(all_of_it["queues"]) == 1
    assert len(all_of_it["hosts"][0]["grants"]) == 1


def test_the_page_escapes_whatever_users_can_name() -> None:
    copy = filled(spec("k", EVIL, "a"))
    entry = LogEntry(n=1, kind="cell", replica=0, lost={EVIL: EVIL})
    copy.apply_kernels(put(keys.log_entry("k", 1), entry, 3), now=0.0)
    copy.apply_kernels(put(keys.replica("k", 0), replica(0, "a", reason=EVIL), 2), now=0.0)
    page = render_dashboard(status_model(copy, ROOT), name=EVIL, admin=True, prefix="/services/nbos/", problem=EVIL)
    assert b"<script>alert" not in page
    assert page.count(b"&lt;script&gt;") >= 5


def test_the_page_needs_no_inline_script_or_style() -> None:
    page = render_dashboard(status_model(filled(spec("k")), ROOT), name="x", admin=False, prefix="/p/").decode()
    assert "unsafe-inline" not in POLICY
    assert "<style" not in page
    assert "style=" not in page
    assert all("src=" in part.split(">")[0] for part in page.split("<script")[1:])
