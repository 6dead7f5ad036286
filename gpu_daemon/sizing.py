"""Right-sizing in the daemon: a bid's wish made smaller by what `rightsizing` learnt, and what cells took told to it.

What was learnt is kept in the run directory, so that a restart (a crash: all but the last minute) loses nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from gpu_daemon.ledger import share_of
from gpu_daemon.requests import BidRequest, Took
from gpu_daemon.rightsizing import Key, Rightsizer
from gpu_daemon.rundir import read_json, write_json
from nbos_cluster.gpumodel import is_model
from nbos_cluster.records import Device, GrantRecord, Resources

log = logging.getLogger("gpu_daemon")

SAVE_EVERY = 60.0


@dataclass(frozen=True)
class Wish:
    """What is asked of the ledger, and what the grant's record says of it (asked: 0 where nothing was decided)."""

    resources: Resources
    asked: int = 0
    code: str = ""
    why: str = ""

    def signed(self, grant: GrantRecord) -> GrantRecord:
        return replace(grant, asked=self.asked, code=self.code, why=self.why)


@dataclass
class Sizing:
    """slowdown: the allowed one, 0: right-sizing is off. file: where it is kept, None: nowhere."""

    slowdown: float = 0.0
    file: Path | None = None
    _sizer: Rightsizer = field(init=False)
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._sizer = Rightsizer(self.slowdown)

    def load(self) -> str:
        """Take up what was kept. Returns why it could not be, or ''."""
        saved = read_json(self.file) if self.file is not None and self.slowdown else None
        if saved is None:
            return ""
        try:
            self._sizer.load(saved["cells"])
        except (ValueError, KeyError, TypeError) as err:
            return f"{self.file} is damaged ({type(err).__name__}: {err}); right-sizing begins anew"
        return ""

    def wish(self, owner: str, request: BidRequest, devices: Iterable[Device]) -> Wish:
        """What this bid asks of the ledger.

        Only slices are made smaller, and their memory stays what it would have been: whole devices are asked for, and
        guaranteed, as such. Not where devices of several models could be granted: their TPCs differ.
        """
        asked = request.resources
        if not (self.slowdown and request.code and asked.tpcs):
            return Wish(asked, code=request.code)
        found = [d for d in devices if d.healthy and is_model(d.model, asked.model)]
        if len({(d.model, d.tpcs, d.memory) for d in found}) != 1:
            return Wish(asked, code=request.code)
        advice = self._sizer.advise(Key(owner, found[0].model, request.code, asked.tpcs))
        less = replace(asked, tpcs=advice.tpcs, memory=share_of(found[0], asked))
        return Wish(less if advice.tpcs < asked.tpcs else asked, asked.tpcs, request.code, advice.why)

    def learn(self, grant: GrantRecord, took: Took | None) -> None:
        """An execution under this grant ended and took so long."""
        if took is None or not grant.code or not grant.asked or len(grant.shares) != 1:
            return
        share = grant.shares[0]
        key = Key(grant.owner, share.model, grant.code, grant.asked)
        self._sizer.observe(key, len(share.tpcs), took.seconds, took.unit, took.whole)
        if time.monotonic() > self._saved + SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Some milliseconds for thousands of cells. A disk that is full costs what was learnt, if the daemon ends."""
        self._saved = time.monotonic()
        if self.file is not None and len(self._sizer):
            try:
                write_json(self.file, {"cells": self._sizer.dump()})
            except OSError as err:
                log.warning("what right-sizing learnt cannot be kept: %s", err)
