"""What `%nbos status`, `%nbos gpu` and `%nbos state` ask of this replica and of its daemon."""

from __future__ import annotations

import time
from typing import Any

from .. import binding, oversize
from ..capture import names
from ..execution import Execution
from ..gpu.gate import gate
from ..link import DaemonAway, Link
from ..replica import Replica
from . import gpuview, stateview
from .reporter import Reporter

Message = dict[str, Any]


class Views:
    """`shell`: the IPython shell."""

    def __init__(self, shell: Any, link: Link, execution: Execution, replica: Replica, reporter: Reporter) -> None:
        self._shell, self._link, self._execution = shell, link, execution
        self._replica, self._reporter = replica, reporter

    def status(self) -> Message:
        """For `%nbos status`, on the main thread, within a cell."""
        greeting = self._execution.greeting
        known = {"kernel": greeting.get("kernel", ""), "replica": greeting.get("replica", -1)}
        known |= {"host": greeting.get("host", ""), "last": self._replica.applied, "members": [], "executor": -1}
        try:
            if not self._link.connected:
                raise DaemonAway(self._link.since())
            reply, _ = self._link.request({"type": "status"}).future.result(timeout=2.0)
        except (TimeoutError, DaemonAway) as err:
            return {**known, "lost": self._replica.lost, "error": str(err) or "the daemon did not answer within 2 s"}
        members = reply.get("members") or {}
        known |= {key: reply[key] for key in ("last", "executor", "queue", "gpu") if key in reply}
        known["members"] = members.get("members", []) if isinstance(members, dict) else members
        everything = {**(reply.get("lost") or {}), **self._replica.lost}
        everything.pop(oversize.MORE, None)  # here all are named
        return {**known, "lost": everything}

    def gpu(self) -> str:
        """For `%nbos gpu`, within a cell."""
        now, uses = time.monotonic(), self._replica.uses
        borrower = self._execution.loans.borrower
        running = uses.running(now, binding.peak(), borrower)
        return gpuview.text(
            self.status(), uses.rows, running, binding.grant(), binding.held(), borrower.moves, gate.armed
        )

    def survey(self) -> Message:
        """For `%nbos state`; within a cell, or in a subshell while a replication is under way."""
        replica, reporter = self._replica, self._reporter
        return stateview.survey(
            stateview.Sources(
                capture=replica.capture,
                ledger=reporter.ledger,
                namespace=self._shell.user_ns,
                variables=lambda: names.user_variables(self._shell.user_ns, self._shell.user_ns_hidden),
                status=self.status(),
                room=reporter.room(),
                progress=reporter.progress,
                more=replica.lazy.rows(),
                replayed=replica.records.covered,
                now=time.monotonic(),
            )
        )
