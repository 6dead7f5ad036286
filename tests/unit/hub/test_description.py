"""The gateway's description of its API says what the code takes."""

from __future__ import annotations

import json
from pathlib import Path

from msgspec.structs import fields

from nbos_cluster.records import Move
from nbos_spawner import gateway
from nbos_spawner.gateway.models import move_model
from nbos_spawner.gateway.moverequests import MoveWanted
from nbos_spawner.gateway.requests import KernelWanted, ResourcesWanted


def test_the_description_names_all_that_a_request_may_hold() -> None:
    described = json.loads((Path(gateway.__file__).parent / "openapi.json").read_text())["components"]["schemas"]
    assert set(KernelWanted.__struct_fields__) <= set(described["KernelWanted"]["properties"])
    assert set(ResourcesWanted.__struct_fields__) == set(described["Resources"]["properties"])
    assert {field.encode_name for field in fields(MoveWanted)} == set(described["MoveWanted"]["properties"])


def test_the_description_names_all_that_is_told_of_a_move() -> None:
    """With values that are the defaults, which records leave out."""
    described = json.loads((Path(gateway.__file__).parent / "openapi.json").read_text())["components"]["schemas"]
    move = Move(source=0, target=1, from_host="a", to_host="b")
    assert set(move_model(move, "")) == set(described["Move"]["properties"])
