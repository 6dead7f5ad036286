"""What a site may say about giving device memory back: the options `c.GivingBack.…`."""

from __future__ import annotations

from typing import cast

from traitlets import Enum, Float
from traitlets.config import Configurable

from gpu_daemon.tiers import Policy, Tier


class GivingBack(Configurable):
    """What is done about device memory that a cell left, once another cell lacks the room (docs/slices.md)."""

    at_most = Enum(
        ["warm", "offload", "checkpoint", "restart"],
        "checkpoint",
        help="How far it goes. warm: what was left stays, the other cell waits. offload: the process moves its tensors "
        "to host memory. checkpoint: the driver moves what stays then, too, where it can. restart: where something "
        "still stays, the process is ended and starts again from the log, without what could not be replicated.",
    ).tag(config=True)
    within = Float(60.0, min=1.0, help="Seconds that a process has to give back; then others are asked.").tag(
        config=True
    )
    again = Float(
        300.0, min=1.0, help="Seconds after which one that did not give back is asked again, without a cell meanwhile."
    ).tag(config=True)

    def policy(self) -> Policy:
        return Policy(cast(Tier, self.at_most), self.within, self.again)
