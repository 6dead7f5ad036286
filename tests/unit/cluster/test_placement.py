"""Where replicas go: different hosts, the least subscribed first, never where there is no room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nbos_cluster.placement import (
    HostLoad,
    NoRoom,
    busiest,
    choose_target,
    loads,
    place,
    replace_lost,
    spread,
    unfit,
)
from nbos_cluster.records import Device, HostRecord, KernelSpec, Move, Resources

GB = 2**30


def host(name: str, gpus: int = 2, *, tpcs: int = 66, room: int = 64, draining: bool = False) -> HostRecord:
    devices = tuple(
        Device(uuid=f"{name}-{i}", index=i, model="H100", tpcs=tpcs, memory=80 * GB, kind="simulated")
        for i in range(gpus)
    )
    return HostRecord(name=name, address="", pid=1, devices=devices, max_replicas=room, draining=draining)


def spec(
    replicas: int = 3,
    placement: dict[str, str] | None = None,
    resources: Resources = Resources(),  # noqa: B008
    kernel: str = "k",
) -> KernelSpec:
    return KernelSpec(
        kernel=kernel,
        owner="ada",
        replicas=replicas,
        placement=placement or {},
        resources=resources,
        key="k",
        curve_publickey="p",
        curve_secretkey="s",
    )


def on(*hosts: HostRecord, specs: list[KernelSpec] | None = None) -> dict[str, HostLoad]:
    return loads(hosts, specs or [])


def test_each_replica_gets_a_host_of_its_own() -> None:
    plan = place(spec(3), on(host("a"), host("b"), host("c"), host("d")))
    assert plan == {"0": "a", "1": "b", "2": "c"}


def test_with_too_few_hosts_they_are_shared_evenly() -> None:
    plan = place(spec(5), on(host("a"), host("b")))
    assert sorted(plan.values()) == ["a", "a", "a", "b", "b"]


def test_the_least_subscribed_host_comes_first() -> None:
    gpu = Resources(gpus=1)
    busy = [spec(1, {"0": "a"}, gpu, "k1"), spec(1, {"0": "a"}, gpu, "k2"), spec(1, {"0": "b"}, gpu, "k3")]
    plan = place(spec(2, resources=gpu), on(host("a"), host("b"), host("c"), specs=busy))
    assert plan == {"0": "c", "1": "b"}


def test_a_slice_counts_as_part_of_a_gpu() -> None:
    found = on(host("a", gpus=1), specs=[spec(1, {"0": "a"}, Resources(tpcs=33))])
    assert found["a"].ratio() == pytest.approx(0.5)


def test_what_stands_stays() -> None:
    plan = place(spec(3), on(host("a"), host("b"), host("c")), {"1": "c"})
    assert plan == {"0": "a", "1": "c", "2": "b"}


def test_a_draining_or_full_host_gets_nothing() -> None:
    hosts = on(host("a", draining=True), host("b", room=1), host("c"))
    assert sorted(place(spec(3), hosts).values()) == ["b", "c", "c"]


def test_no_room_says_why() -> None:
    hosts = on(host("a", draining=True), host("b", room=0))
    with pytest.raises(NoRoom, match="a drains; b holds 0 of at most 0") as err:
        place(spec(1), hosts)
    assert not err.value.lasting
    with pytest.raises(NoRoom, match="no host has reported") as none:
        place(spec(1), {})
    assert none.value.lasting


def test_asking_for_more_than_any_host_has_says_what_there_is() -> None:
    with pytest.raises(NoRoom, match="2 healthy GPUs of the 9 asked for") as err:
        place(spec(1, resources=Resources(gpus=9)), on(host("a")))
    assert err.value.lasting
    assert "largest GPU has 66 TPCs, 72" in unfit(host("a"), Resources(tpcs=72))
    assert "0 healthy A100" in unfit(host("a"), Resources(gpus=1, model="A100"))
    assert "bytes" in unfit(host("a"), Resources(gpus=1, memory=99 * GB))
    assert not unfit(host("a", gpus=0), Resources())


def test_the_first_replica_can_lead_and_the_others_get_their_own_hosts() -> None:
    hosts = on(host("a", gpus=0), host("b", gpus=0), host("c", gpus=1))
    plan = place(spec(3, resources=Resources(gpus=1)), hosts)
    assert plan["0"] == "c"
    assert spread(plan) == 3


def test_only_lost_replicas_move() -> None:
    standing = spec(3, {"0": "a", "1": "b", "2": "c"})
    hosts = on(host("b"), host("c"), host("d"), specs=[standing])
    assert replace_lost(standing, hosts) == {"0": "d", "1": "b", "2": "c"}


def test_when_all_is_well_nothing_moves() -> None:
    standing = spec(2, {"0": "a", "1": "a"})
    assert replace_lost(standing, on(host("a"), host("b"), specs=[standing])) is None


def test_a_replica_moves_to_a_host_of_its_own_and_never_to_one_that_drains() -> None:
    standing = spec(2, {"0": "a", "1": "b"})
    assert choose_target(standing, on(host("a"), host("b"), host("c"), specs=[standing]), "0") == "c"
    assert choose_target(standing, on(host("a"), host("b"), host("c", draining=True), specs=[standing]), "0") == "b"
    assert choose_target(standing, on(host("a"), host("b"), host("c"), specs=[standing]), "0", avoid={"c"}) == "b"
    with pytest.raises(NoRoom):
        choose_target(standing, on(host("a"), host("b", room=1), specs=[standing]), "0")


def test_what_moves_is_left_to_its_move_and_others_are_replaced_meanwhile() -> None:
    moving = replace(spec(2, {"0": "a", "1": "b", "2": "c"}), move=Move(source=0, target=2, from_host="a", to_host="c"))
    assert replace_lost(moving, on(host("b"), host("c"), host("d"), specs=[moving])) is None
    assert replace_lost(moving, on(host("a"), host("c"), host("d"), specs=[moving])) == {"0": "a", "1": "d", "2": "c"}


def test_a_kernel_whose_numbers_have_gaps_gets_the_lowest_free_one() -> None:
    standing = spec(3, {"0": "a", "4": "b"})
    assert replace_lost(standing, on(host("a"), host("b"), host("c"), specs=[standing])) == {
        "0": "a", "1": "c", "4": "b"
    }  # fmt: skip


def test_the_replica_on_the_most_loaded_host_is_the_one_to_move() -> None:
    gpu = Resources(gpus=1)
    mine, other = spec(2, {"0": "a", "1": "b"}, gpu), spec(1, {"0": "b"}, gpu, "other")
    assert busiest(mine, on(host("a"), host("b"), specs=[mine, other])) == "1"


def test_a_replica_lost_without_another_host_says_so() -> None:
    standing = spec(2, {"0": "a", "1": "b"})
    with pytest.raises(NoRoom):
        replace_lost(standing, on(host("b", room=1), specs=[standing]))


hosts_strategy = st.lists(
    st.builds(
        host,
        st.sampled_from("abcdef"),
        st.integers(0, 3),
        room=st.integers(0, 6),
        draining=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda record: record.name,
)
wants = st.sampled_from([Resources(), Resources(gpus=1), Resources(tpcs=10), Resources(gpus=2)])


@given(hosts_strategy, st.integers(1, 5), wants)
def test_every_plan_keeps_the_rules(hosts: list[HostRecord], replicas: int, needs: Resources) -> None:
    usable = {h.name: h for h in hosts if not h.draining and h.max_replicas}
    try:
        plan = place(spec(replicas, resources=needs), on(*hosts))
    except NoRoom:
        fit = [h for h in usable.values() if not unfit(h, needs)]
        assert not fit or sum(h.max_replicas for h in usable.values()) < replicas
        return
    assert list(plan) == [str(i) for i in range(replicas)]
    assert set(plan.values()) <= set(usable)
    assert spread(plan) == min(replicas, len(usable)), "different hosts wherever there are enough"
    for name in usable:
        assert list(plan.values()).count(name) <= usable[name].max_replicas
    assert not unfit(usable[plan["0"]], needs)
    assert plan == place(spec(replicas, resources=needs), on(*reversed(hosts))), "the order does not matter"
