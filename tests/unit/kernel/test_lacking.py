"""What the store has lost is written again by an executor that still has it; what finds no room sends nothing."""

from __future__ import annotations

from typing import Any

from nbos_cluster.content import address
from nbos_kernel.blobchannel import BlobFailed
from nbos_kernel.capture.buffers import frame
from nbos_kernel.capture.changes import Packed
from nbos_kernel.fitting import BLOCK, fitting
from nbos_kernel.lacking import LONGEST, MOST, Lacking
from nbos_kernel.lazy.loading import BlobMissing

from .pair import Pair


def failed(code: str) -> BlobMissing:
    error = BlobMissing("its data")
    error.__cause__ = BlobFailed(code, "because")
    return error


def names_in(entry: dict[str, Any]) -> list[str]:
    return [name for component in entry["components"] for name in component["names"]]


def test_only_what_the_store_has_lost_is_lacked_and_only_while_it_is_lost_for_that_reason() -> None:
    lacking = Lacking(lambda name: 0)
    for code in ("missing", "corrupt", "away", "failed", "refused"):
        lacking.note([code], "why", failed(code))
    lacking.note(["other"], "why", ValueError("a pickle that does not load"))
    every = dict.fromkeys(("missing", "corrupt", "away", "failed", "refused", "other"), "why")
    assert lacking.here(every) == ["missing", "corrupt"]
    assert lacking.here({"missing": "cannot be pickled", "corrupt": "why"}) == ["corrupt"]
    assert lacking.here({}) == []


def test_as_many_are_told_as_a_record_holds() -> None:
    lacking = Lacking(lambda name: 0)
    some = ["x" * (LONGEST + 1), *(f"v{i}" for i in range(2 * MOST))]
    lacking.note(some, "why", failed("missing"))
    assert lacking.here(dict.fromkeys(some, "why")) == some[1 : MOST + 1]


def test_a_variable_is_due_once_for_each_time_that_somebody_lacked_its_latest_entry() -> None:
    wrote = {"a": 5, "b": 9}
    lacking = Lacking(lambda name: wrote.get(name, 0))
    lacking.heard([{"applied": 7, "lacks": ["a", "b"]}, {"applied": 8}, {"applied": 2, "lacks": ["a", "old"]}])
    assert lacking.due() == {"a", "old"}
    wrote["a"] = 10
    assert lacking.due() == {"old"}
    lacking.heard([{"applied": 10, "lacks": ["a"]}])
    assert lacking.due() == {"a"}
    lacking.heard([{"applied": 10}])
    assert lacking.due() == set()


def test_the_next_entry_has_the_component_with_all_its_blobs_though_nothing_changed() -> None:
    pair = Pair()
    pair.cell("wide = bytearray(100_000); same = [wide]; plain = 'p' * 40_000; alone = bytes(50_000)")
    replica = pair.executor.replica
    replica.ledger.wrote(pair.n, [(["wide", "same", "plain", "alone"], 0)], ())
    pair.blobs.clear()
    replica.lacking.heard([{"applied": pair.n, "lacks": ["same", "plain", "never"]}])
    assert [(each.names, each.anew, each.known) for each in replica.changes().components] == [
        (("plain",), True, True),
        (("same", "wide"), True, True),
    ]
    entry = pair.cell("1")
    assert {"same", "wide", "plain"} <= set(names_in(entry))
    assert "alone" not in names_in(entry)
    assert len(pair.blobs) == 2
    assert pair.on_standby("same[0] is wide, len(wide), len(plain)") == (True, 100_000, 40_000)
    replica.ledger.wrote(pair.n, [(["wide", "same", "plain"], 0)], ())
    assert not {"same", "wide", "plain"} & set(names_in(pair.cell("2")))


def test_what_this_replica_lacks_itself_is_not_written_and_not_deleted() -> None:
    pair = Pair()
    replica = pair.executor.replica
    replica.lacking.heard([{"applied": 1, "lacks": ["gone"]}])
    replica.capture.note({"gone": "cannot be loaded on this replica"})
    entry = pair.cell("1")
    assert "gone" not in [*names_in(entry), *entry["deleted"], *entry["lost"]]


def packed(name: str, *chunks: bytes) -> Packed:
    return Packed((name,), name, tuple(frame(chunk) for chunk in chunks))


def test_a_component_that_does_not_fit_sends_nothing_and_leaves_the_room_to_others() -> None:
    large, small, shared = b"l" * 3 * BLOCK, b"s" * (BLOCK + 1), b"t" * BLOCK
    components = [packed("large", large, shared), packed("small", small, shared), packed("again", shared)]
    wanted = [(each, chunk, data) for each in components for frame in each.frames for chunk, data in frame.chunks()]
    kept, refused = fitting(wanted, (), 3 * BLOCK)
    assert [(each.names, chunk.address) for each, chunk, _ in kept] == [
        (("small",), address(small)),
        (("small",), address(shared)),
        (("again",), address(shared)),
    ]
    assert [(each[0].names, needs) for each, needs in refused] == [(("large",), 4 * BLOCK)]
    assert fitting(wanted, (), 6 * BLOCK) == (wanted, [])
    assert fitting(wanted, {address(large)}, 3 * BLOCK) == (wanted, [])  # sent again, and takes no more room
