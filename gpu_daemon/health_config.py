"""What a site may say about how its GPUs are watched: the options `c.Health.…`, checked when the daemon starts."""

from __future__ import annotations

from typing import Any

from traitlets import Float, Integer, List, TraitError, validate
from traitlets.config import Configurable

from gpu_daemon.condition import Policy
from gpu_daemon.health import HealthOptions


class Health(Configurable):
    """How real GPUs are watched, and what takes one out of use (docs/gpus.md)."""

    every = Float(
        10.0, help="Seconds between two looks at the GPUs through NVML, from 0.1 up. XIDs are heard at once."
    ).tag(config=True)
    stuck = Float(30.0, help="Seconds after which a driver that does not answer makes its GPUs unusable.").tag(
        config=True
    )
    ecc_limit = Integer(
        0, min=0, help="Uncorrected memory errors since its last reset with which a GPU is still used."
    ).tag(config=True)
    steady = Integer(2, help="Looks without a complaint after which a GPU is used again, from 1 up.").tag(config=True)
    cool_by = Integer(5, help="Degrees (°C) below the slow-down temperature at which a hot GPU is used again.").tag(
        config=True
    )
    harmless_xids = List(
        Integer(), help="XIDs that take no GPU out of use, besides the programs' own (13, 31, 43, 45, 68, 109)."
    ).tag(config=True)

    @validate("every", "stuck", "steady", "cool_by")
    def _valid_amount(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        least = {"every": 0.1, "stuck": 0.1, "steady": 1, "cool_by": 0}[name]
        if value < least:
            raise TraitError(f"Health.{name} is {value}; use {least} or more")
        return value

    def options(self) -> HealthOptions:
        policy = Policy(self.ecc_limit, self.steady, self.cool_by, frozenset(self.harmless_xids))
        return HealthOptions(self.every, self.stuck, policy)
