"""Which replicas are started, ended and reported, without a process."""

from __future__ import annotations

from gpu_daemon.fleet import (
    FIRST_CELL,
    HEAD_START,
    Died,
    Fleet,
    Forget,
    Found,
    Hello,
    Instruction,
    Publish,
    ReplicaId,
    Start,
    Stop,
    Tick,
    Unwanted,
    Wanted,
)

K0, K1 = ReplicaId("k", 0), ReplicaId("k", 1)


def wanted(*indexes: int, now: float = 0, incarnation: int = 1, usable: bool = False) -> Wanted:
    return Wanted("k", frozenset(indexes), incarnation, usable, now)


def starts(instructions: list[Instruction]) -> list[ReplicaId]:
    return [i.id for i in instructions if isinstance(i, Start)]


def running(*indexes: int) -> Fleet:
    fleet = Fleet()
    fleet.handle(wanted(*indexes, usable=True))
    for index in indexes:
        fleet.handle(Hello(ReplicaId("k", index), 1))
    return fleet


def test_the_first_replica_starts_alone_and_the_others_soon_after_it_is_usable() -> None:
    fleet = Fleet()
    assert starts(fleet.handle(wanted(0, 1))) == [K0]
    assert starts(fleet.handle(Tick(1))) == []
    assert starts(fleet.handle(wanted(0, 1, now=2, usable=True))) == []
    assert starts(fleet.handle(wanted(0, 1, now=2.2, usable=True))) == []
    assert fleet.next_due() == 2 + FIRST_CELL, "no later record puts it off"
    assert starts(fleet.handle(Tick(2 + FIRST_CELL))) == [K1]


def test_the_others_do_not_wait_longer_because_the_first_is_usable_late() -> None:
    fleet = Fleet()
    fleet.handle(wanted(0, 1))
    fleet.handle(wanted(0, 1, now=HEAD_START - 0.1, usable=True))
    assert starts(fleet.handle(Tick(HEAD_START))) == [K1]


def test_the_others_start_after_four_seconds_even_if_the_first_is_not_usable() -> None:
    fleet = Fleet()
    fleet.handle(wanted(1))
    assert fleet.next_due() == 4
    assert starts(fleet.handle(Tick(4))) == [K1]


def test_a_replica_that_died_is_started_again_with_a_growing_pause() -> None:
    fleet, now, pauses = running(0), 1.0, []
    for _ in range(9):
        fleet.handle(Died(K0, "killed", now))
        due = fleet.next_due()
        assert due is not None
        pauses.append(round(due - now, 3))
        now = due
        assert starts(fleet.handle(Tick(now))) == [K0]
        fleet.validate_state()
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]


def test_after_a_long_life_the_pause_is_short_again() -> None:
    fleet = running(0)
    fleet.handle(Died(K0, "killed", 1))
    fleet.handle(Tick(2))
    fleet.handle(Died(K0, "killed", 1000))
    assert fleet.next_due() == 1000.2


def test_five_quick_deaths_are_reported_as_failed_with_the_reason() -> None:
    fleet, now, states = running(0), 1.0, []
    for _ in range(5):
        published = [i for i in fleet.handle(Died(K0, "exit status 1", now)) if isinstance(i, Publish)]
        states.append(published[0].state)
        now = fleet.next_due() or 0
        fleet.handle(Tick(now))
    assert states == ["starting"] * 4 + ["failed"]
    assert "exit status 1" in published[0].reason


def test_a_new_incarnation_starts_only_after_the_old_process_is_gone() -> None:
    fleet = running(0)
    out = fleet.handle(wanted(0, incarnation=2, usable=True, now=2))
    assert [i for i in out if isinstance(i, Stop | Start)] == [Stop(K0, "the kernel is restarted")]
    assert Start(K0, 2) in fleet.handle(Died(K0, "left", 3))


def test_whoever_has_started_a_process_learns_that_it_should_end_already() -> None:
    fleet = running(0)
    assert fleet.ends(K0) == ""
    fleet.handle(wanted(0, incarnation=2, usable=True, now=2))
    assert fleet.ends(K0) == "the kernel is restarted"
    fleet.handle(Died(K0, "left", 3))
    assert fleet.ends(K0) == ""
    fleet.handle(wanted(now=4))
    assert fleet.ends(K0) == fleet.ends(K1) == "the replica is not wanted on this host any more"


def test_a_replica_that_is_not_wanted_any_more_is_ended_and_forgotten() -> None:
    fleet = running(0, 1)
    assert [type(i) for i in fleet.handle(wanted(0, now=2, usable=True))] == [Stop]
    assert fleet.handle(Died(K1, "left", 3)) == [Forget(K1)]
    assert fleet.count() == 1


def test_a_replica_wanted_again_while_it_ends_is_started_again() -> None:
    fleet = running(0)
    fleet.handle(wanted(now=2))
    fleet.handle(wanted(0, now=2.5, usable=True))
    assert starts(fleet.handle(Died(K0, "left", 3))) == [K0]


def test_a_process_found_again_is_not_started_twice_and_ended_when_it_is_outdated() -> None:
    fleet = Fleet()
    fleet.handle(Found(K0, 1, 0))
    assert starts(fleet.handle(wanted(0, now=1))) == []
    fleet = Fleet()
    fleet.handle(Found(K0, 1, 0))
    assert Stop(K0, "the kernel is restarted") in fleet.handle(wanted(0, now=1, incarnation=2))


def test_a_host_that_comes_back_starts_nothing_before_what_it_must_no_longer_run_is_gone() -> None:
    fleet = Fleet()
    fleet.handle(Found(K0, 1, 0))
    assert fleet.handle(Unwanted(K0)) == [Stop(K0, "the replica is not wanted on this host any more")]
    assert starts(fleet.handle(Wanted("other", frozenset({0}), 1, True, 0))) == []
    assert fleet.next_due() is None  # no clock helps: the end of the process does
    gone = fleet.handle(Died(K0, "ended", 1))
    assert gone == [Forget(K0), Start(ReplicaId("other", 0), 1)]
    fleet.validate_state()


def test_an_unwanted_replica_that_is_gone_already_is_nothing() -> None:
    assert Fleet().handle(Unwanted(K0)) == []


def test_the_replica_with_the_lowest_number_starts_alone_whatever_the_number_is() -> None:
    """After moves a kernel's numbers may begin above 0."""
    fleet = Fleet()
    assert starts(fleet.handle(Wanted("k", frozenset({2, 3}), 1, False, 0, first=2))) == [ReplicaId("k", 2)]
