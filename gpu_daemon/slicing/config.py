"""What a site may say about slices: the options `c.Slicing.…`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from traitlets import Bool, Enum, TraitError, Unicode, validate
from traitlets.config import Configurable

from gpu_daemon.slicing.mps import PIPE


class Slicing(Configurable):
    """How slices of a device are held (docs/slices.md)."""

    at_most = Enum(
        ["mig", "green", "percentage", "cooperative"],
        "mig",
        help="The strongest mechanism to use; the daemon takes the strongest up to it that this host has.",
    ).tag(config=True)
    one_trust_domain = Bool(
        False,
        help="Whether all whose kernels run on this host trust each other. Only then do slices of one device run side "
        "by side under MPS, where a fault in one process can end the others; else processes take turns.",
    ).tag(config=True)
    mps_pipe = Unicode(PIPE, help="The pipe folder of this host's MPS daemon (its CUDA_MPS_PIPE_DIRECTORY).").tag(
        config=True
    )

    @validate("mps_pipe")
    def _valid_pipe(self, proposal: Any) -> Any:
        if not Path(proposal["value"]).is_absolute():
            raise TraitError(f"Slicing.mps_pipe must be an absolute path such as {PIPE}, not {proposal['value']!r}")
        return proposal["value"]
