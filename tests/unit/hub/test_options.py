"""Options of a user's kernels: from the form and from REST, checked the same way."""

from typing import Any

import pytest

from nbos_spawner.form import options_form
from nbos_spawner.limits import Limits
from nbos_spawner.options import KernelOptions, OptionError, options_from_form, parse_options
from nbos_spawner.sizes import parse_size, show_size

LIMITS = Limits(replicas=3, gpus=2, tpcs=16, memory=20 << 30)


def test_nothing_chosen_means_three_replicas_and_no_gpu() -> None:
    assert parse_options({}, Limits()) == KernelOptions(replicas=3)


def test_the_default_never_passes_the_users_limit() -> None:
    assert parse_options({}, Limits(replicas=1)).replicas == 1


def test_the_form_and_rest_give_the_same() -> None:
    form = options_from_form(
        {"replicas": ["2"], "gpus": [""], "tpcs": ["8"], "memory": ["10G"], "_xsrf": ["x"]}, LIMITS
    )
    assert form == parse_options({"replicas": 2, "tpcs": 8, "memory": 10 << 30}, LIMITS).as_dict()


@pytest.mark.parametrize(
    ("said", "size"),
    [("on", 64 << 20), (True, 64 << 20), ("off", 0), (False, 0), ("0", 0), ("200M", 200 << 20), (1000, 1000)],
)
def test_lazy_is_a_switch_or_a_size(said: Any, size: int) -> None:
    assert parse_options({"lazy": said}, LIMITS, lazy=7).lazy == size


def test_lazy_is_what_the_site_says_unless_chosen() -> None:
    assert parse_options({}, LIMITS).lazy == 0
    assert parse_options({"lazy": ""}, LIMITS, lazy=7).lazy == 7
    assert options_from_form({"replicas": ["2"]}, LIMITS, lazy=7)["lazy"] == 7
    assert parse_options(parse_options({"lazy": "on"}, LIMITS).as_dict(), LIMITS, lazy=7).lazy == 64 << 20
    assert "lazy" not in parse_options({"lazy": "on"}, LIMITS).resources()


def test_a_wrong_lazy_says_how_to_write_it() -> None:
    with pytest.raises(OptionError, match=r"lazy must be on, off, or the size .* 'sometimes' is no size"):
        parse_options({"lazy": "sometimes"}, LIMITS)


def test_the_form_shows_what_lazy_is() -> None:
    assert 'name="lazy" maxlength="64" value="off"' in options_form(LIMITS, KernelOptions())
    assert 'name="lazy" maxlength="64" value="64M"' in options_form(LIMITS, KernelOptions(lazy=64 << 20))


@pytest.mark.parametrize("field", ["replicas", "gpus", "tpcs"])
def test_too_much_names_the_thing_the_limit_and_the_way_out(field: str) -> None:
    bound = getattr(LIMITS, field)
    with pytest.raises(OptionError, match=rf"{bound + 1} .* your limit is {bound}; ask for at most {bound}") as caught:
        parse_options({field: bound + 1}, LIMITS)
    assert caught.value.limit


def test_too_much_memory_is_said_in_words() -> None:
    with pytest.raises(OptionError, match=r"21G .* limit is 20G"):
        parse_options({"gpus": 1, "memory": "21G"}, LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        {"replicas": 0},
        {"replicas": "two"},
        {"replicas": -1},
        {"replicas": True},
        {"replicas": 1.5},
        {"gpus": [1]},
        {"gpus": None},
        {"gpus": 1, "tpcs": 1},
        {"memory": "lots", "gpus": 1},
        {"memory": "1G"},
        {"model": "x" * 65, "gpus": 1},
        {"model": "a\nb", "gpus": 1},
        {"unknown": 1},
        {"tpcs": "９"},
    ],
)
def test_nonsense_is_refused_and_is_no_matter_of_limits(data: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(data, LIMITS)
    assert not caught.value.limit


def test_a_field_sent_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="2 times"):
        options_from_form({"gpus": ["1", "2"]}, LIMITS)


def test_the_form_shows_the_bounds_and_the_last_choice() -> None:
    page = options_form(LIMITS, KernelOptions(replicas=2, tpcs=8))
    assert 'name="replicas" min="1" max="3"' in page
    assert 'name="tpcs" min="0" max="16"' in page
    assert 'value="8"' in page


def test_every_field_of_the_form_has_a_label_and_a_description() -> None:
    page = options_form(LIMITS, KernelOptions())
    for name in ("replicas", "gpus", "tpcs", "memory", "model"):
        assert f'<label class="form-label" for="nbos-{name}">' in page
        assert f'id="nbos-{name}-help"' in page


def test_the_form_escapes_what_the_user_chose_before() -> None:
    page = options_form(LIMITS, KernelOptions(model='"><script>alert(1)</script>'))
    assert "<script>" not in page


def test_who_may_use_no_gpu_is_told_so() -> None:
    assert "You may not use GPUs" in options_form(Limits(gpus=0), KernelOptions())


@pytest.mark.parametrize(("text", "size"), [("20G", 20 << 30), ("512m", 512 << 20), ("1.5 GiB", 3 << 29), ("7", 7)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_sizes_are_shown_as_they_are_read() -> None:
    assert [show_size(s) for s in (80 << 30, 3 << 29, 100, 0)] == ["80G", "1.5G", "100", "0"]


def test_the_form_offers_the_users_images_and_shows_the_last_choice() -> None:
    assert "<select" not in options_form(LIMITS, KernelOptions())
    page = options_form(Limits(images=("lab:1", "lab:2")), KernelOptions(image="lab:2"))
    assert '<option value="lab:2" selected>' in page
    assert '<option value="lab:1">' in page
    assert options_from_form({"image": ["lab:1"]}, Limits(images=("lab:1",)))["image"] == "lab:1"
