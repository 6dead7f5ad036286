"""What a site may say about the watchdog: the options `c.Watchdog.…`."""

from __future__ import annotations

from typing import Any

from traitlets import Enum, Float, Integer, TraitError, Unicode, validate
from traitlets.config import Configurable

from gpu_daemon.sizes import parse_bytes
from gpu_daemon.watchdog.policy import STAGES, Policy


class Watchdog(Configurable):
    """What is done about processes that use a GPU beyond their grant (docs/slices.md)."""

    without_grant = Enum(
        STAGES,
        "restart",
        help="How far it goes with a replica that computes on a device without holding a grant there.",
    ).tag(config=True)
    over_budget = Enum(
        STAGES, "restart", help="How far it goes with a replica that uses more memory than its grant says, and `slack`."
    ).tag(config=True)
    grace = Float(10.0, min=1.0, help="Seconds that an offence lasts before its user is warned.").tag(config=True)
    patience = Float(
        30.0, min=1.0, help="Seconds from the warning to the interrupt, and from that to the restart."
    ).tag(config=True)
    slack = Unicode(
        "1G", help="Device memory beyond its budget that every process may have: CUDA's context is about half of it."
    ).tag(config=True)
    busy = Integer(2, min=1, max=100, help="Percent of the SMs' time from which a process counts as computing.").tag(
        config=True
    )
    every = Float(2.0, min=0.0, help="Seconds between two looks; 0: the watchdog is off.").tag(config=True)

    @validate("slack")
    def _valid_size(self, proposal: Any) -> Any:
        try:
            parse_bytes(proposal["value"])
        except ValueError as err:
            raise TraitError(f"Watchdog.slack: {err}") from err
        return proposal["value"]

    @validate("every")
    def _valid_every(self, proposal: Any) -> Any:
        if proposal["value"] >= self.grace:
            raise TraitError(
                f"Watchdog.every ({proposal['value']} s) must be less than Watchdog.grace ({self.grace} s): an offence "
                "that is seen less often would be over before it counts"
            )
        return proposal["value"]

    def policy(self) -> Policy:
        names = ("without_grant", "over_budget", "grace", "patience", "busy")
        return Policy(**{name: getattr(self, name) for name in names}, slack=parse_bytes(self.slack))
