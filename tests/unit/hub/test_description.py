"""The gateway's description of its API says what the code takes."""

from __future__ import annotations

import json
from pathlib import Path

from nbos_spawner import gateway
from nbos_spawner.gateway.requests import KernelWanted, ResourcesWanted


def test_the_description_names_all_that_a_request_may_hold() -> None:
    described = json.loads((Path(gateway.__file__).parent / "openapi.json").read_text())["components"]["schemas"]
    assert set(KernelWanted.__struct_fields__) <= set(described["KernelWanted"]["properties"])
    assert set(ResourcesWanted.__struct_fields__) == set(described["Resources"]["properties"])
