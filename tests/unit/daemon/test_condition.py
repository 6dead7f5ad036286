"""When a GPU is taken out of use and when it comes back: the state machine alone."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gpu_daemon import xids
from gpu_daemon.condition import Closed, Conditions, Heard, Looked, Policy, Reopened, Sample, Verdict

WELL = Sample(ecc=0, temperature=40, limit=90)


def seen(conditions: Conditions, *samples: Sample) -> Verdict:
    """How GPU a stands after these looks, one after the other."""
    for sample in samples:
        conditions.handle(Looked({"a": sample}))
    return conditions.verdicts()[0]


@pytest.mark.parametrize(
    ("ill", "words", "passing"),
    [
        (Sample(lost="GPU is lost"), "the device is lost (GPU is lost)", False),
        (Sample(ecc=1), "1 uncorrected memory errors", False),
        (Sample(remap_failed=True), "could not be replaced", False),
        (Sample(action="a reset of the GPU"), "the driver wants a reset", False),
        (Sample(slowed=True, temperature=95), "too hot (95 °C)", True),
        (Sample(temperature=90, limit=90), "slows down at 90 °C", True),
    ],
)
def test_what_is_measured_closes_at_once_and_opens_when_it_was_gone_for_two_looks(
    ill: Sample, words: str, passing: bool
) -> None:
    conditions = Conditions(["a"])
    closed = seen(conditions, WELL, ill)
    assert words in closed.reason
    assert closed.passing is passing
    assert seen(conditions, WELL) == closed
    assert seen(conditions, WELL) == Verdict("a")


def test_a_complaint_between_two_good_looks_begins_the_count_anew() -> None:
    conditions = Conditions(["a"])
    assert seen(conditions, Sample(ecc=1), WELL, Sample(ecc=1), WELL).reason
    assert not seen(conditions, WELL).reason


def test_heat_is_over_only_clearly_below_the_limit() -> None:
    conditions = Conditions(["a"], Policy(cool_by=5, steady=1))
    assert seen(conditions, Sample(temperature=90, limit=90), Sample(temperature=86, limit=90)).reason
    assert not seen(conditions, Sample(temperature=84, limit=90)).reason
    assert not seen(conditions, Sample(temperature=89, limit=90)).reason


def test_memory_errors_up_to_the_limit_are_borne() -> None:
    conditions = Conditions(["a"], Policy(ecc_limit=2))
    assert not seen(conditions, Sample(ecc=2)).reason
    assert "3 uncorrected memory errors since its last reset (borne: 2)" in seen(conditions, Sample(ecc=3)).reason


def test_a_critical_xid_holds_until_an_admin_says_so() -> None:
    conditions = Conditions(["a", "b"])
    (closed,) = conditions.handle(Heard("a", 79))
    assert "fallen off the bus (XID 79)" in closed.reason
    assert "--undo" in closed.reason
    assert conditions.handle(Looked({"a": WELL, "b": WELL})) == []
    assert conditions.handle(Reopened("b")) == []
    assert conditions.handle(Reopened("a")) == [Verdict("a")]


def test_an_admin_does_not_open_what_is_measured() -> None:
    conditions = Conditions(["a"])
    seen(conditions, Sample(ecc=4))
    conditions.handle(Heard("a", 48))
    (verdict,) = conditions.handle(Reopened("a"))
    assert verdict.reason.startswith("4 uncorrected")


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 109, 63, 94, 154])
def test_a_programs_own_mistakes_and_notes_close_nothing(xid: int) -> None:
    assert Conditions(["a"]).handle(Heard("a", xid)) == []


def test_an_xid_that_nothing_is_known_of_closes_unless_the_site_says_it_is_harmless() -> None:
    assert "an error of the device (XID 999)" in Conditions(["a"]).handle(Heard("a", 999))[0].reason
    assert Conditions(["a"], Policy(harmless=frozenset({999}))).handle(Heard("a", 999)) == []


def test_xids_outlive_a_restart_of_the_daemon() -> None:
    before = Conditions(["a", "b"])
    before.handle(Heard("b", 119))
    after = Conditions(["a", "b"], heard={**before.heard(), "gone": [48]})
    assert [bool(verdict.reason) for verdict in after.verdicts()] == [False, True]


def test_a_driver_that_does_not_answer_closes_all_and_passes() -> None:
    conditions = Conditions(["a", "b"], Policy(steady=1))
    verdicts = conditions.handle(Looked({}, gone="driver not loaded"))
    assert [(v.uuid, v.passing) for v in verdicts] == [("a", True), ("b", True)]
    assert conditions.handle(Looked({"a": WELL, "b": WELL})) == [Verdict("a"), Verdict("b")]


def test_what_an_admin_closed_opens_when_the_admin_says_so() -> None:
    conditions = Conditions(["a", "b"])
    assert conditions.handle(Closed({"a": "its fan is changed"})) == [Verdict("a", "its fan is changed")]
    assert conditions.handle(Closed({"a": "its fan is changed"})) == []
    assert conditions.handle(Closed({})) == [Verdict("a")]


def test_every_meaning_has_its_words_and_none_has_two() -> None:
    tables = (xids.APPLICATION, xids.NOTES, xids.CRITICAL)
    assert len(set().union(*tables)) == sum(map(len, tables))
    assert xids.words(79) == "it has fallen off the bus (XID 79)"


SAMPLES = st.builds(
    Sample,
    lost=st.sampled_from(["", "", "", "lost"]),
    ecc=st.sampled_from([None, 0, 0, 1]),
    remap_failed=st.sampled_from([False, False, False, True]),
    temperature=st.sampled_from([None, 40, 86, 90]),
    limit=st.sampled_from([None, 90]),
    slowed=st.sampled_from([False, False, False, True]),
    action=st.sampled_from(["", "", "a reset of the GPU"]),
)


class ConditionMachine(RuleBasedStateMachine):
    """Against what was said of each GPU, in the simplest words: the open ones are exactly those with nothing against
    them, what is told adds up to how things stand, and nothing is told twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conditions = Conditions("ab")
        self.told = {uuid: Verdict(uuid) for uuid in "ab"}
        self.xids: dict[str, set[int]] = {"a": set(), "b": set()}
        self.closed: dict[str, str] = {}
        self.good = {"a": 2, "b": 2}
        """Looks since the last one that closes whatever was before it; 2 is enough."""

    def take(self, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            assert self.told[verdict.uuid] != verdict
            self.told[verdict.uuid] = verdict

    @rule(uuid=st.sampled_from("ab"), sample=SAMPLES)
    def look(self, uuid: str, sample: Sample) -> None:
        self.take(self.conditions.handle(Looked({uuid: sample})))
        bad = sample.lost or sample.ecc or sample.remap_failed or sample.action or sample.slowed
        hot = sample.temperature is not None and sample.limit is not None and sample.temperature >= 85
        if bad or (hot and sample.temperature == 90):
            self.good[uuid] = 0
        elif hot:
            self.good[uuid] = -1 if self.good[uuid] in (0, -1) else self.good[uuid] + 1  # may still count as hot
        else:
            self.good[uuid] = max(0, self.good[uuid]) + 1

    @rule(why=st.just("no driver"))
    def gone(self, why: str) -> None:
        self.take(self.conditions.handle(Looked({}, gone=why)))
        self.good = {"a": 0, "b": 0}

    @rule(uuid=st.sampled_from("ab"), xid=st.sampled_from([13, 48, 63, 79]))
    def hear(self, uuid: str, xid: int) -> None:
        self.take(self.conditions.handle(Heard(uuid, xid)))
        if xid in (48, 79):
            self.xids[uuid].add(xid)

    @rule(closed=st.dictionaries(st.sampled_from("ab"), st.just("by an admin")))
    def close(self, closed: dict[str, str]) -> None:
        self.take(self.conditions.handle(Closed(closed)))
        self.closed = closed

    @rule(uuid=st.sampled_from("ab"))
    def reopen(self, uuid: str) -> None:
        self.take(self.conditions.handle(Reopened(uuid)))
        self.xids[uuid].clear()

    @rule()
    def restart(self) -> None:
        """The daemon: what is measured is measured again, the rest is brought along."""
        self.conditions = Conditions("ab", heard=self.conditions.heard())
        self.conditions.handle(Closed(self.closed))
        self.told = {verdict.uuid: verdict for verdict in self.conditions.verdicts()}
        self.good = {"a": 2, "b": 2}

    @invariant()
    def told_is_how_it_stands(self) -> None:
        assert self.told == {verdict.uuid: verdict for verdict in self.conditions.verdicts()}

    @invariant()
    def open_exactly_while_nothing_speaks_against_it(self) -> None:
        for verdict in self.conditions.verdicts():
            lasting = bool(self.xids[verdict.uuid]) or verdict.uuid in self.closed
            if lasting or self.good[verdict.uuid] == 0:
                assert verdict.reason
            elif self.good[verdict.uuid] >= 2:
                assert not verdict.reason
            if lasting:
                assert not verdict.passing
            if verdict.passing:
                assert verdict.reason


TestConditionMachine = ConditionMachine.TestCase
