"""The gateway's accounts: what may be asked, who sees what, and sums that are true."""

from __future__ import annotations

import csv
import io

import pytest

from nbos_cluster.records import UseLine
from nbos_spawner.gateway.accounts import AMOUNTS, as_csv, columns_of, read_wanted, rows, show_hour, visible
from nbos_spawner.gateway.auth import Caller
from nbos_spawner.gateway.errors import ApiError

NOON = 1_763_380_800.0  # 2025-11-17T12:00Z
LINES = [
    UseLine(hour=1, owner="ann", kernel="k1", groups=("a", "b"), cells=1, seconds=10.0, tpc_seconds=660.0, joules=5.0),
    UseLine(hour=2, owner="ann", kernel="k2", groups=("a", "b"), cells=2, seconds=20.5, tpc_seconds=20.5),
    UseLine(hour=2, owner="bob", kernel="k3", groups=("a",), cells=1, seconds=0.25, byte_seconds=1e12),
    UseLine(hour=2, owner="eve", kernel="k4", cells=1, seconds=3.0),
]


def test_without_a_question_it_is_the_last_thirty_days_including_now() -> None:
    wanted = read_wanted({}, now=NOON + 1)
    assert (show_hour(wanted.since), show_hour(wanted.until)) == (
        "2025-10-18T13:00:00+00:00",
        "2025-11-17T13:00:00+00:00",
    )


@pytest.mark.parametrize(
    ("text", "hour"),
    [("2025-11-17", "00"), ("2025-11-17T10:00", "10"), ("2025-11-17T10:00Z", "10"), ("2025-11-17T10:00+02:00", "08")],
)
def test_times_are_days_or_whole_hours(text: str, hour: str) -> None:
    assert show_hour(read_wanted({"since": text}, now=NOON).since) == f"2025-11-17T{hour}:00:00+00:00"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"since": "yesterday"}, "since='yesterday' must be a day or an hour such as"),
        ({"until": "2025-11-17T10:30"}, "until='2025-11-17T10:30' must be a whole hour"),
        ({"since": "2025-11-17T00:00+05:30"}, "must be a whole hour"),
        ({"since": "2025-11-17", "until": "2025-11-17"}, "since must be before until"),
        ({"since": "1999-01-01"}, "3660 days apart at most"),
        ({"since": "0001-01-01"}, "since"),
        ({"by": "cell"}, "by='cell' is unknown; use user, group or kernel"),
        ({"format": "xml"}, "format='xml' is unknown"),
    ],
)
def test_a_wrong_question_is_refused_by_name(query: dict[str, str], said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        read_wanted(query, now=NOON)
    assert caught.value.status == 400


def test_a_user_sees_what_is_their_own_an_administrator_all_a_service_nothing() -> None:
    assert {one.owner for one in visible(LINES, Caller("ann", "user", False))} == {"ann"}
    assert len(list(visible(LINES, Caller("root", "user", True)))) == 4
    assert list(visible(LINES, Caller("ann", "service", False))) == []


@pytest.mark.parametrize("by", ["user", "group", "kernel"])
def test_rows_add_up_to_the_whole_whatever_they_are_summed_by(by: str) -> None:
    table = rows(LINES, by)  # type: ignore[arg-type]
    for name, field in zip(
        AMOUNTS, ("cells", "seconds", "device_seconds", "tpc_seconds", "byte_seconds", "joules"), strict=True
    ):
        assert sum(row[name] for row in table) == sum(getattr(line, field) for line in LINES)


def test_rows_are_users_sets_of_groups_or_kernels() -> None:
    assert [(row["user"], row["cells"]) for row in rows(LINES, "user")] == [("ann", 3), ("bob", 1), ("eve", 1)]
    assert [(row["group"], row["seconds"]) for row in rows(LINES, "group")] == [("", 3.0), ("a", 0.25), ("a+b", 30.5)]
    assert [row["user"] for row in rows(LINES, "kernel") if row["kernel"] == "k1"] == ["ann"]


def test_csv_has_a_head_and_no_formulas() -> None:
    text = as_csv(rows([*LINES, UseLine(hour=1, owner="=1+1", kernel="k")], "user"), "user")
    found = list(csv.DictReader(io.StringIO(text)))
    assert tuple(found[0]) == columns_of("user")
    assert found[0]["user"] == "'=1+1"
    assert (found[1]["user"], found[1]["cells"], found[1]["seconds"]) == ("ann", "3", "30.500")
