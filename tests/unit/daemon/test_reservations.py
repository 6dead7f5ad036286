"""Reservations for courses: as configured, when they hold, what they keep and from whom."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from gpu_daemon.ledger import GIB, Ledger, Request
from gpu_daemon.order import Policy
from gpu_daemon.queue import Admit, Arrive, Ended, FairQueue, Instruction, Room
from gpu_daemon.reservations import ReservationError, read_reservations
from gpu_daemon.simulated import simulated
from nbos_cluster.records import Resources

BERLIN = ZoneInfo("Europe/Berlin")
COURSE: dict[str, Any] = {
    "name": "ml101",
    "groups": ["ml101"],
    "seats": 3,
    "tpcs": 4,
    "days": ["tuesday"],
    "from": "10:00",
    "to": "12:00",
    "timezone": "Europe/Berlin",
}


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()


TUESDAY = at("2026-11-17T00:00")
HOUR = 3600.0


def queue(devices: int = 2, **changes: Any) -> FairQueue:
    """Times of its events are seconds since that Tuesday's midnight in Berlin."""
    course = read_reservations([COURSE | changes])
    ledger = Ledger("h", simulated("h", devices, "H200", tpcs=8, memory=8 * GIB))
    course[0].check("h", ledger.devices)
    return FairQueue(ledger, Policy(reservations=course), wall=TUESDAY)


def arrive(name: str, hour: float, owner: str = "ann", groups: tuple[str, ...] = (), **resources: int) -> Arrive:
    return Arrive(Request(name, owner, "k-" + owner, 0, 1, Resources(**resources), groups), hour * HOUR)


def student(name: str, hour: float, **resources: int) -> Arrive:
    return arrive(name, hour, name, ("ml101",), **resources or {"tpcs": 4})


def admitted(instructions: list[Instruction]) -> list[str]:
    return [i.grant.grant for i in instructions if isinstance(i, Admit)]


def test_windows_recur_by_weekday_and_stay_at_their_hour_when_clocks_change() -> None:
    (course,) = read_reservations([COURSE | {"days": ["sun"], "from": "01:30", "to": "03:30"}])
    assert course.window(at("2026-10-24T12:00")) == (at("2026-10-25T01:30"), at("2026-10-25T03:30"))
    begin, end = course.window(at("2026-10-24T12:00")) or (0, 0)
    assert end - begin == 3 * HOUR, "the night in which an hour comes twice"
    assert course.window(at("2026-10-25T02:00")) == (begin, end), "while it is on"
    assert course.window(end) == (at("2026-11-01T01:30"), at("2026-11-01T03:30"))


def test_a_term_has_a_first_and_a_last_day() -> None:
    (course,) = read_reservations([COURSE | {"first": "2026-10-13", "last": "2026-10-20"}])
    assert course.window(at("2026-01-01T00:00")) == (at("2026-10-13T10:00"), at("2026-10-13T12:00"))
    assert course.window(at("2026-10-20T11:00")) is not None
    assert course.window(at("2026-10-20T12:00")) is None


def test_while_the_course_is_on_its_seats_are_for_its_students() -> None:
    q = queue()
    assert admitted(q.handle(arrive("ann", 10.5, tpcs=4))) == ["ann"], "beside three seats there is room for 4 TPCs"
    assert admitted(q.handle(arrive("bob", 10.5, "bob", tpcs=1))) == []
    for name in ("s1", "s2", "s3"):
        assert admitted(q.handle(student(name, 10.6))) == [name]
    assert admitted(q.handle(student("s4", 10.7))) == [], "there are three seats, all are taken"
    assert q.order(10.7 * HOUR) == ["bob", "s4"], "and nobody is owed a fourth"
    assert admitted(q.handle(Ended("s1", 10.8 * HOUR))) == ["s4"], "students come before others"
    assert admitted(q.handle(Ended("ann", 10.9 * HOUR))) == ["bob"]


def test_the_course_ends_and_its_room_is_everybodys() -> None:
    q = queue()
    q.handle(arrive("ann", 11, tpcs=8))
    (tell,) = q.news(11 * HOUR)
    assert tell.reason == (
        "the free room on host h is kept for the course ml101 (Tuesday 10:00 to 12:00 Europe/Berlin), and a cell of "
        "this kernel may take 60 min"
    )
    assert tell.estimate == HOUR
    assert admitted(q.handle(Room(11.99 * HOUR))) == []
    assert admitted(q.handle(Room(12 * HOUR))) == ["ann"]


def test_before_the_course_others_may_use_its_room_for_cells_that_end_in_time() -> None:
    q = queue()
    assert admitted(q.handle(arrive("early", 8.9, "eve", gpus=1))) == ["early"], "an unknown cell counts an hour"
    q.handle(Ended("early", 9.1 * HOUR))
    assert admitted(q.handle(arrive("late", 9.2, "bob", gpus=1))) == []
    assert admitted(q.handle(arrive("short", 9.3, "eve", gpus=1))) == ["short"], "hers took 12 minutes"
    q.handle(Ended("short", 9.4 * HOUR))
    assert admitted(q.handle(arrive("too late", 9.95, "eve", gpus=1))) == []


def test_who_waits_for_the_course_to_end_keeps_no_device_from_those_who_end_before_it() -> None:
    q = queue()
    q.handle(arrive("x", 6, "eve", tpcs=8))
    q.handle(Ended("x", 6.1 * HOUR))
    q.handle(arrive("long", 9.5, "bob", gpus=2))
    assert admitted(q.handle(arrive("short", 9.6, "eve", gpus=2))) == ["short"]


def test_a_student_s_cell_within_a_seat_is_not_kept_out_before_the_course() -> None:
    q = queue()
    assert admitted(q.handle(student("s1", 9.9))) == ["s1"]


def test_more_than_a_seat_is_not_a_students_right() -> None:
    q = queue()
    assert admitted(q.handle(student("s1", 10.1, tpcs=8))) == []
    assert admitted(q.handle(student("s2", 10.2, tpcs=3))) == ["s2"]
    assert q.order(10.2 * HOUR) == ["s1"]


def test_seats_of_whole_devices() -> None:
    q = queue(devices=3, tpcs=0, gpus=1, seats=2)
    assert admitted(q.handle(arrive("ann", 10.1, gpus=1))) == ["ann"]
    assert admitted(q.handle(arrive("bob", 10.1, "bob", tpcs=1))) == []
    assert admitted(q.handle(student("s1", 10.2, gpus=1))) == ["s1"]
    assert admitted(q.handle(student("s2", 10.2, gpus=1))) == ["s2"]


def test_an_overdue_cell_longer_than_any_gap_goes_in_between_courses() -> None:
    """Daily, all devices, and a kernel whose cells take 23 of the 22 hours between."""
    q = queue(days=["mon", "tue", "wed", "thu", "fri", "sat", "sun"], seats=4)
    q.durations.add("ann", "k-ann", 23 * HOUR)
    assert admitted(q.handle(arrive("ann", 12.5, gpus=1))) == []
    assert admitted(q.handle(Room(13 * HOUR))) == []
    assert admitted(q.handle(Room(13.5 * HOUR))) == ["ann"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ""}, "reservation 1: name is missing"),
        ({"colour": "red"}, "reservation ml101: 'colour' is unknown; there are name, users"),
        ({"groups": []}, "it is for nobody; name users or groups"),
        ({"groups": "ml101"}, "groups must be a list of names"),
        ({"seats": 0}, "seats must be a whole number from 1 to 10000, not 0"),
        ({"gpus": 1}, "either so many tpcs or so many gpus"),
        ({"days": []}, "days must be a list of weekdays"),
        ({"days": ["tues"]}, "'tues' is no weekday; write monday"),
        ({"from": "10"}, "from must be a time of day such as '10:00', not '10'"),
        ({"to": "09:00"}, "it ends at 09:00, before it begins at 10:00; write one over midnight as two"),
        ({"timezone": ""}, "timezone is missing; write for example"),
        ({"timezone": "Mars/Base"}, "knows no time zone 'Mars/Base'"),
        ({"first": "13.10.2026"}, "first must be a day such as"),
        ({"first": "2026-10-13", "last": "2026-10-12"}, "its last day 2026-10-12 is before its first"),
        ({"memory": "lots"}, "memory: 'lots' is no size"),
    ],
)
def test_a_wrong_reservation_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ReservationError, match=said):
        read_reservations([COURSE | changes])


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ReservationError, match="reservation ml101: the name stands twice"):
        read_reservations([COURSE, COURSE])


def test_more_seats_than_the_host_has_are_refused() -> None:
    with pytest.raises(ReservationError, match="host h has room for 4 seats of 4 TPCs, not 5; reserve at most 4 here"):
        queue(seats=5)
