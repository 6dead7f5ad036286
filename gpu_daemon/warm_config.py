"""What a site may say about replicas that are started ahead: the options `c.Warm.…`, checked when the daemon starts."""

from __future__ import annotations

from typing import Any

from traitlets import Bool, Enum, Float, Integer, List, TraitError, Unicode, validate
from traitlets.config import Configurable

from gpu_daemon import preloading
from gpu_daemon.sizes import parse_bytes
from gpu_daemon.warm_pool import WarmOptions
from gpu_daemon.warming import Policy


class Warm(Configurable):
    """Replicas that are started before anybody asks for one."""

    policy = Enum(
        ["demand", "fixed", "off"],
        "demand",
        help="How many are kept: as many as are asked for while one is made (Little's law), and at least `keep`; "
        "`keep`; none, every replica then starts afresh.",
    ).tag(config=True)
    keep = Integer(1, min=0, help="How many wait: always (fixed), at least (demand).").tag(config=True)
    most = Integer(4, min=1, help="How many wait at most, those that are being made counted.").tag(config=True)
    modules = List(
        Unicode(),
        help="Modules that are imported ahead besides ipykernel, for example ['numpy', 'torch']. Their memory is "
        "shared by all replicas of the host. None may make secrets when it is imported: all would have the same.",
    ).tag(config=True)
    images = List(
        Unicode(),
        help="Replicas in Docker: images of which containers are always kept; empty: Docker.image. Where containers "
        "depend on their owner, an owner's are kept when a kernel of theirs may be asked for.",
    ).tag(config=True)
    learn = Bool(
        True,
        help="Whether modules that many of the host's kernels import are imported ahead as well: installed ones only, "
        "that passed a trial (docs/warm.md, docs/security.md).",
    ).tag(config=True)
    learn_most = Integer(24, min=1, help="How many modules are imported ahead because kernels import them.").tag(
        config=True
    )
    learn_memory = Unicode("512M", help="Memory that those may take together, in the parent of all replicas.").tag(
        config=True
    )
    learn_patience = Float(
        300.0, min=0.0, help="Seconds that trying and importing them waits for half a core of the host to be idle."
    ).tag(config=True)  # fmt: skip
    confidence = Float(0.95, help="How surely (0 to 1) a start finds a waiting replica, by demand.").tag(config=True)
    window = Float(600.0, min=1.0, help="Seconds over which starts are counted, by demand.").tag(config=True)
    calm = Float(
        60.0, min=0.0, help="Seconds that there must be too many of them before one is ended."
    ).tag(config=True)  # fmt: skip
    reserve = Unicode("1G", help="Memory of the host that they leave free: with less, none waits.").tag(config=True)

    @validate("modules")
    def _valid_modules(self, proposal: Any) -> Any:
        for name in proposal["value"]:
            if not all(part.isidentifier() for part in name.split(".")):
                raise TraitError(f"Warm.modules holds {name!r}, which is no module's name; write it as in `import`")
        return proposal["value"]

    @validate("confidence")
    def _valid_confidence(self, proposal: Any) -> float:
        if not 0.0 < proposal["value"] < 1.0:
            raise TraitError(f"Warm.confidence is {proposal['value']}; it must lie between 0 and 1, for example 0.95")
        return float(proposal["value"])

    @validate("reserve", "learn_memory")
    def _valid_size(self, proposal: Any) -> Any:
        try:
            parse_bytes(proposal["value"])
        except ValueError as err:
            raise TraitError(str(err)) from err
        return proposal["value"]

    def options(self) -> WarmOptions:
        """Raises TraitError when the numbers do not go together."""
        if self.keep > self.most:
            raise TraitError(f"Warm.keep is {self.keep}, Warm.most only {self.most}; raise most or lower keep")
        names = ("keep", "most", "confidence", "window", "calm")
        numbers = {name: getattr(self, name) for name in names}
        kind: Any = self.policy
        policy = Policy(kind=kind, reserve=parse_bytes(self.reserve), **numbers)
        preload = preloading.Policy(
            learn=self.learn,
            patience=self.learn_patience,
            most=self.learn_most,
            memory=parse_bytes(self.learn_memory),
            reserve=parse_bytes(self.reserve),
        )
        return WarmOptions(policy, tuple(self.modules), tuple(self.images), preload)
