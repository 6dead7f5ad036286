"""What a site may say about its GPUs' clocks: the options `c.Power.…`."""

from __future__ import annotations

from traitlets import Bool, Float
from traitlets.config import Configurable

from gpu_daemon.power.governor import Policy


class Power(Configurable):
    """Lower clocks where that costs what runs little (docs/power.md)."""

    enabled = Bool(False, help="Lock the clocks of this host's GPUs. NVML wants root for that.").tag(config=True)
    slip = Float(0.04, min=0.001, max=1.0, help="How much slower what runs on a device may become: 0.04 is 4 %.").tag(
        config=True
    )
    least = Float(0.5, min=0.1, max=1.0, help="The lowest clock, as a part of the highest.").tag(config=True)
    down_after = Float(
        60.0,
        min=1.0,
        help="Seconds between a switch and the next one down; each takes about 50 ms.",
    ).tag(config=True)
    up_after = Float(5.0, min=0.5, help="Seconds between a switch and the next one up.").tag(config=True)
    every = Float(2.0, min=0.1, help="Seconds between two looks at what runs.").tag(config=True)

    def policy(self) -> Policy:
        return Policy(self.slip, self.least, self.down_after, self.up_after)
