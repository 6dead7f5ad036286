"""What a site may say about lending: the options `c.Lending.…`."""

from __future__ import annotations

from typing import Any

from traitlets import Bool, Enum, Float, TraitError, validate
from traitlets.config import Configurable

from gpu_daemon.lender import Terms
from gpu_daemon.watchdog.policy import STAGES


class Lending(Configurable):
    """Idle quota lent to cells that can use more than they own (docs/rightsizing.md)."""

    enabled = Bool(
        True,
        help="Idle quota is given to others on loan, and goes back when its owner's next cell asks. False: it is given "
        "for the length of a cell, and its owner waits for that.",
    ).tag(config=True)
    within = Float(
        0.5,
        min=0.0,
        max=60.0,
        help="Seconds that a borrower has to come to the end of a step, before it is stopped between two lines.",
    ).tag(config=True)
    patience = Float(
        10.0,
        min=1.0,
        help="Seconds after which a borrower that has not given back is warned, and from each stage to the next.",
    ).tag(config=True)
    late = Enum(STAGES, "restart", help="How far it goes with a borrower that does not give back.").tag(config=True)

    @validate("patience")
    def _valid_patience(self, proposal: Any) -> Any:
        if proposal["value"] <= self.within:
            raise TraitError(
                f"Lending.patience ({proposal['value']} s) must be more than Lending.within ({self.within} s): a "
                "borrower is late only when it could have given back"
            )
        return proposal["value"]

    def terms(self) -> Terms:
        return Terms(self.within, self.patience, self.late)
