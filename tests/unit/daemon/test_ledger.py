"""The grant ledger: what fits, what waits, what can never be; and what promise 3 says about all of it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from gpu_daemon.ledger import GIB, Busy, Fit, Impossible, Ledger, LedgerError, Request
from gpu_daemon.limits import over_limit
from gpu_daemon.simulated import simulated
from nbos_cluster.records import GrantRecord, Resources

DEVICES = simulated("h", 2, "H200", tpcs=8, memory=8 * GIB)


def ledger() -> Ledger:
    return Ledger("h", DEVICES)


def ask(grant: str, **resources: int | str) -> Request:
    return Request(grant, "ann", "k", 0, 1, Resources(**resources))  # type: ignore[arg-type]


def given(book: Ledger, grant: str, **resources: int | str) -> GrantRecord:
    record = book.reserve(ask(grant, **resources))
    assert isinstance(record, GrantRecord), record
    book.validate_state()
    return record


def test_a_whole_device_is_exclusive() -> None:
    book = ledger()
    share = given(book, "a", gpus=1).shares[0]
    assert (share.whole, share.tpcs, share.memory) == (True, tuple(range(8)), 8 * GIB)
    given(book, "b", gpus=1)
    assert isinstance(book.reserve(ask("c", tpcs=1)), Busy)


def test_slices_share_a_device_with_separate_tpcs_and_their_part_of_the_memory() -> None:
    book = ledger()
    first, second = given(book, "a", tpcs=3).shares[0], given(book, "b", tpcs=3).shares[0]
    assert first.uuid == second.uuid
    assert not set(first.tpcs) & set(second.tpcs)
    assert first.memory == 3 * GIB


def test_slices_fill_a_device_before_they_break_another() -> None:
    book = ledger()
    given(book, "a", tpcs=2)
    given(book, "b", tpcs=2)
    assert isinstance(book.fit(Resources(gpus=1)), Fit)


def test_memory_is_a_limit_of_its_own() -> None:
    book = ledger()
    given(book, "a", tpcs=1, memory=7 * GIB)
    given(book, "b", tpcs=1, memory=7 * GIB)
    assert isinstance(book.reserve(ask("c", tpcs=1, memory=2 * GIB)), Busy)


def test_a_released_grant_frees_all_of_it_and_releasing_twice_is_no_mistake() -> None:
    book = ledger()
    given(book, "a", gpus=2)
    assert book.release("a") is not None
    assert book.release("a") is None
    given(book, "b", gpus=2)


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        (Resources(gpus=3), "ask for at most 2"),
        (Resources(tpcs=9), "ask for at most 8 TPCs"),
        (Resources(tpcs=1, memory=9 * GIB), "ask for less memory"),
        (Resources(gpus=1, model="A100"), "has H200"),
        (Resources(gpus=1, tpcs=1), "ask for one of the two"),
        (Resources(gpus=-1), "negative"),
    ],
)
def test_what_can_never_be_is_refused_with_the_way_out(resources: Resources, text: str) -> None:
    refused = ledger().fit(resources)
    assert isinstance(refused, Impossible)
    assert text in refused.reason


def test_a_host_without_gpus_says_so() -> None:
    refused = Ledger("h").fit(Resources(gpus=1))
    assert isinstance(refused, Impossible)
    assert "%%cpu" in refused.reason


def test_an_unhealthy_device_is_granted_to_nobody_new() -> None:
    book = ledger()
    book.set_health(DEVICES[0].uuid, False, "fell off the bus")
    assert given(book, "a", gpus=1).shares[0].uuid == DEVICES[1].uuid
    assert isinstance(book.fit(Resources(gpus=2)), Impossible)


def test_restoring_what_another_grant_holds_is_refused() -> None:
    book = ledger()
    record = given(book, "a", tpcs=4)
    assert book.restore(record) is None
    assert book.restore(replace(record, grant="b")) is not None
    book.validate_state()


def test_using_a_grant_name_twice_is_an_error_with_its_story() -> None:
    book = ledger()
    given(book, "a", gpus=1)
    with pytest.raises(LedgerError, match="latest steps"):
        book.reserve(ask("a", gpus=1))


def test_a_kernels_own_limit() -> None:
    limit = Resources(gpus=1, tpcs=4, memory=8 * GIB)
    assert over_limit(Resources(), Resources(), DEVICES) == ""
    assert over_limit(Resources(gpus=1), limit, DEVICES) == ""
    assert "1 whole GPUs" in over_limit(Resources(gpus=2), limit, DEVICES)
    assert "4 TPCs" in over_limit(Resources(tpcs=5), limit, DEVICES)
    assert "no GPU" in over_limit(Resources(tpcs=1), Resources(), DEVICES)
    assert "4.0 GiB" in over_limit(Resources(gpus=1), replace(limit, memory=4 * GIB), DEVICES)
