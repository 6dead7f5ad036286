"""One process that is checkpointed and restored, step by step. No IO: `step` says what the driver is to do, `answered`
what came of it.

    running --lock--> locked --checkpoint--> checkpointed --restore--> locked --unlock--> running

Guarantees: a process is locked for no longer than a checkpoint or restore takes: where the checkpoint is refused it is
unlocked again, and runs on as if nothing had been; a restore that failed is `failed` for good, and never tried again
(the process must be ended); before a locked process is ended it is unlocked.
"""

from __future__ import annotations

from typing import Literal

from gpu_daemon.checkpoint.driver import State

Step = Literal["lock", "checkpoint", "restore", "unlock"]
Aim = Literal["parked", "running", "ended"]

_NEXT: dict[tuple[Aim, State], Step] = {
    ("parked", "running"): "lock",
    ("parked", "locked"): "checkpoint",
    ("running", "checkpointed"): "restore",
    ("running", "locked"): "unlock",
    ("ended", "locked"): "unlock",
}
_LEADS_TO: dict[Step, State] = {
    "lock": "locked",
    "checkpoint": "checkpointed",
    "restore": "locked",
    "unlock": "running",
}


class Process:
    """state: what the driver says at first. error: the first refusal, '' while all went well."""

    def __init__(self, aim: Aim, state: State) -> None:
        self.aim, self.state, self.error = aim, state, ""
        if state == "failed":
            self.error = "an earlier checkpoint or restore of it failed for good"

    @property
    def step(self) -> Step | None:
        """What is to be done next; None: it is over, `state` and `error` say how."""
        if self.error and self.state != "locked":
            return None
        return _NEXT.get((self.aim, self.state))

    def answered(self, error: str = "") -> None:
        """The driver did `step`, or refused it."""
        step = self.step
        assert step is not None, "nothing was asked"
        if not error:
            self.state = _LEADS_TO[step]
            return
        self.error = self.error or error
        if step == "checkpoint":
            self.aim = "running"  # from locked: unlock
        elif step != "lock":
            self.state = "failed"
