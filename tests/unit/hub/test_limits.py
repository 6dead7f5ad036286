"""Limits: what a user may ask for, by default, by group and by name."""

import pytest

from nbos_spawner.limits import Limits, LimitsError, read_limits


def test_without_configuration_everybody_has_the_default() -> None:
    assert read_limits({}).of("ada") == Limits()


def test_a_users_own_entry_wins_over_the_groups() -> None:
    table = read_limits({"groups": {"lab": {"gpus": 8}}, "users": {"ada": {"gpus": 1}}})
    assert table.of("ada", ["lab"]).gpus == 1


def test_of_several_groups_the_most_generous_value_counts_field_by_field() -> None:
    table = read_limits({"groups": {"a": {"gpus": 1, "kernels": 9}, "b": {"gpus": 3, "kernels": 2}}})
    found = table.of("ada", ["a", "b"])
    assert (found.gpus, found.kernels) == (3, 9)


def test_a_group_may_lower_the_default() -> None:
    table = read_limits({"default": {"gpus": 4}, "groups": {"students": {"gpus": 0}}})
    assert table.of("eve", ["students"]).gpus == 0


def test_images_of_several_groups_come_together() -> None:
    table = read_limits({"groups": {"a": {"images": ["x:1"]}, "b": {"images": ["y:1", "x:1"]}}})
    assert table.of("ada", ["a", "b"]).images == ("x:1", "y:1")
    assert table.of("bob").images == ()


def test_sizes_are_written_as_people_write_them() -> None:
    assert read_limits({"default": {"memory": "20G"}}).of("ada").memory == 20 << 30


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"user": {}}, "'user'"),
        ({"default": {"gpu": 1}}, "default.gpu"),
        ({"users": {"ada": {"gpus": -1}}}, "users.ada.gpus"),
        ({"users": {"ada": {"gpus": True}}}, "users.ada.gpus"),
        ({"groups": {"lab": {"replicas": 6}}}, "1 to 5"),
        ({"groups": {"lab": {"memory": "much"}}}, "20G"),
        ({"groups": {"lab": 3}}, "groups.lab"),
        ({"groups": []}, "groups"),
        ({"users": {"ada": {"images": "lab:1"}}}, "users.ada.images"),
        ({"default": {"images": ["no name"]}}, "lab/kernel:1"),
    ],
)
def test_a_wrong_entry_is_named(config: dict[str, object], words: str) -> None:
    with pytest.raises(LimitsError, match=words):
        read_limits(config)
