"""Lists of members come from several daemons and the gateway; a late one must not undo what is known."""

from __future__ import annotations

from nbos_provisioner.fleet import Fleet
from nbos_provisioner.instructions import Connect, Disconnect, Member
from nbos_provisioner.members import CHANNELS

PORTS = {channel: 15000 + number for number, channel in enumerate(CHANNELS)}


def listed(state: str, pid: int = 7) -> tuple[Member, ...]:
    return (Member(0, "host-1", state, "127.0.0.1", PORTS if state == "ready" else {}, -1, pid, ""),)


def test_a_list_older_than_what_is_known_loses_nobody() -> None:
    fleet = Fleet()
    fleet.update(1, listed("ready"), revision=12)
    fleet.up.add(0)
    assert fleet.update(1, listed("starting"), revision=10) == ([], [])
    assert 0 in fleet.connected_to


def test_a_newer_list_ends_the_connection_of_a_replica_that_starts_again() -> None:
    fleet = Fleet()
    fleet.update(1, listed("ready"), revision=12)
    fleet.up.add(0)
    _, lost = fleet.update(1, listed("starting", pid=8), revision=13)
    assert [index for index, _ in lost] == [0]


def test_a_successor_that_answers_already_is_not_disconnected_by_the_news_of_it() -> None:
    """Its outputs would be lost with the connection."""
    fleet = Fleet()
    fleet.update(1, listed("ready"), revision=12)
    fleet.up.add(0)
    fleet.lost(0)
    fleet.up.add(0)  # the process that was started in its place
    assert fleet.update(1, listed("ready"), revision=13) == ([], [])  # late: still of the one that died
    assert fleet.update(1, listed("starting", pid=8), revision=14) == ([], [])
    assert fleet.update(1, listed("ready", pid=8), revision=15) == ([], [])
    _, lost = fleet.update(1, listed("ready", pid=9), revision=16)
    assert [index for index, _ in lost] == [0]


def test_a_successor_at_another_address_is_connected_to() -> None:
    fleet = Fleet()
    fleet.update(1, listed("ready"), revision=12)
    fleet.up.add(0)
    fleet.lost(0)
    moved = Member(0, "host-2", "ready", "127.0.0.2", PORTS, -1, 8, "")
    todo, _ = fleet.update(1, (moved,), revision=13)
    assert todo == [Disconnect(0), Connect(0, "127.0.0.2", PORTS)]


def test_a_new_epoch_counts_whatever_its_revision() -> None:
    fleet = Fleet()
    fleet.update(1, listed("ready"), revision=12)
    fleet.up.add(0)
    _, lost = fleet.update(2, listed("starting", pid=8), revision=3)
    assert [index for index, _ in lost] == [0]


def test_a_replica_that_was_moved_away_is_heard_to_its_end_and_asked_nothing_more() -> None:
    """What it printed last is on its way when the news of its leaving comes by another replica."""
    fleet = Fleet()
    stays = Member(1, "host-2", "ready", "127.0.0.2", PORTS, -1, 8, "")
    fleet.update(1, (*listed("ready"), stays), revision=12)
    fleet.up |= {0, 1}
    fleet.appoint(0, 5)
    assert fleet.update(2, (stays,), revision=13) == ([], [])
    assert fleet.admit(0, b"nbos.5.stream") == b"stream"
    assert fleet.candidates() == {1}
    assert fleet.lost(0) == [Disconnect(0)]
    assert fleet.current() == 1
    assert 0 not in fleet.connected_to


def test_a_number_that_is_given_again_is_a_new_connection() -> None:
    fleet = Fleet()
    fleet.update(1, listed("ready"), revision=12)
    fleet.up.add(0)
    fleet.update(2, (), revision=13)
    again = Member(0, "host-3", "ready", "127.0.0.3", PORTS, -1, 9, "")
    todo, lost = fleet.update(3, (again,), revision=14)
    assert todo == [Disconnect(0), Connect(0, "127.0.0.3", PORTS)]
    assert [index for index, _ in lost] == [0]
