"""Which names a GPU's model goes by."""

import pytest

from nbos_cluster.gpumodel import is_model

A100, H200 = "NVIDIA A100-SXM4-80GB", "NVIDIA H200"


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (H200, ""),
        (H200, "H200"),
        (H200, "nvidia h200"),
        (A100, "a100"),
        (A100, "A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA H200 MIG 1g.18gb", "1g.18gb"),
        ("NVIDIA H200 MIG 1g.18gb", "H200"),
    ],
)
def test_a_model_is_named_by_words_of_its_name(model: str, wanted: str) -> None:
    assert is_model(model, wanted)


@pytest.mark.parametrize(
    ("model", "wanted"),
    [(A100, "A10"), (A100, "100"), (H200, "H20"), (H200, "H2000"), (H200, "H100"), (H200, "!"), (A100, "A100 NVIDIA")],
)
def test_a_part_of_a_word_is_another_model(model: str, wanted: str) -> None:
    assert not is_model(model, wanted)
