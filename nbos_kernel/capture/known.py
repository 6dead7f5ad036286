"""What the log holds of the namespace, as this replica remembers it, and how entries change that.

Guarantees: it agrees with the log after `accept` (an entry of this replica) and `adopt` (one of another executor); a
name stands either with a digest or among the lost ones, never with both; what is not trusted any more is examined
again by the next comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from . import hidden, names
from .found import NOT_LOOKED_INTO, Changes, Unit
from .loaded import Loaded


class Known:
    """`namespace`: the user's; `settings`: what is gathered from IPython and libraries."""

    def __init__(self, namespace: Mapping[str, Any], settings: hidden.Hidden | None) -> None:
        self._user, self._hidden = namespace, settings
        self.atoms: dict[str, Any] = {}  # the very objects the log holds, kept so that identity means something
        self.digests: dict[str, str] = {}  # of the component each name stands in
        self.units: dict[str, Unit] = {}
        # What every fresh replica has alike; random states differ and are written by the first cell.
        self.settings = settings.values() if settings is not None else {}
        for name in [name for name in self.settings if name.endswith("random")]:
            del self.settings[name]
        self.latest: dict[str, int] = {}
        self.absent: set[str] = set()  # names this replica never had: not being there is no deletion
        self.words: set[str] = set()  # named by code that ran since
        self.everything = False
        self.anew: set[str] = set()
        """Names that the next entry writes again, changed or not: the store has lost what the log names for them."""
        self.lost: dict[str, str] = {}
        self.from_log = False
        """Whether something was loaded from the log since `Capture.look_ahead`: whoever it handed functions to is not
        known."""
        self.on_device: set[str] = set()
        """Names that were loaded here with data of a GPU, and not examined since."""
        self.written: dict[str, int] = {}
        """What the last accepted changes wrote: bytes by component."""

    def accept(self, found: Changes) -> None:
        """The changes are in the log (or will be): compare with them from now on."""
        for packed in found.components:
            for name in packed.names:
                self.digests[name] = packed.digest
                self.lost.pop(name, None)
                self.absent.discard(name)
        for name in found.deleted:
            self.digests.pop(name, None)
            self.lost.pop(name, None)
        for name, reason in found.lost.items():
            self.digests.pop(name, None)
            self.absent.discard(name)
            self.lost[name] = reason
        for name in [*found.deleted, *found.atoms]:
            self.units.pop(name, None)
        for unit in found.units:
            self.units.update(dict.fromkeys(unit.names, unit))
            self.on_device.difference_update(unit.names)
        self.on_device.difference_update(found.deleted, found.atoms)
        self.atoms, self.settings = found.atoms, found.settings
        self._trust_no_more(found.again)
        self.words, self.everything, self.anew = set(), False, set()
        self.latest, self.from_log = self._latest(), False
        self.written = {", ".join(packed.names): packed.fresh for packed in found.components}

    def device_names(self) -> set[str]:
        """The variables that hold data of a GPU, wherever that lies now."""
        return self.on_device | {name for name, unit in self.units.items() if unit.device}

    def lose(self, lost: Mapping[str, str]) -> None:
        """What accepted changes said is in the log could not be put there."""
        self._trust_no_more(lost)
        for name, reason in lost.items():
            self.digests.pop(name, None)
            self.lost[name] = reason

    def note(self, lost: Mapping[str, str]) -> None:
        """Keep these as lost, although they are no variables: they do not end because the namespace lacks them."""
        self.lost.update(lost)
        self.absent.update(lost)

    def forget(self, noted: Iterable[str]) -> None:
        """What `note` said holds no more."""
        for name in noted:
            self.lost.pop(name, None)
            self.absent.discard(name)

    def away(self, some: Iterable[str]) -> None:
        """These stand in the log and are not loaded here: not being there is no deletion."""
        self.absent.update(some)

    def here(self, some: Iterable[str]) -> None:
        """These are loaded now, or bound to something else."""
        self.absent.difference_update(some)

    def unlooked(self) -> bool:
        """An entry was applied: whether there is anything to look into. What it did not write has waited once more."""
        waiting = [unit for unit in self.units.values() if unit.exposed == NOT_LOOKED_INTO]
        for unit in {id(unit): unit for unit in waiting}.values():
            unit.in_vain += 1
        return self.from_log or bool(waiting)

    def exposed(self) -> list[Unit]:
        """What was looked into and found to be referred to from elsewhere."""
        units = {id(unit): unit for unit in self.units.values()}.values()
        return [unit for unit in units if unit.exposed and unit.exposed != NOT_LOOKED_INTO]

    def _trust_no_more(self, some: Iterable[str]) -> None:
        for name in some:
            self.units.pop(name, None)
            self.atoms.pop(name, None)
            self.settings.pop(name, None)

    def adopt(
        self,
        digests: Mapping[str, str],
        deleted: Iterable[str],
        lost: Mapping[str, str],
        missing: Mapping[str, str],
        whole: bool,
    ) -> None:
        """An entry of another executor was applied: this is what the log holds now. `whole`: it replaced
        everything.

        `lost`: what the log says cannot be replicated; `missing`: what could not be loaded here although the log
        has it.
        """
        if whole:
            self.digests, self.lost, self.absent, self.units, self.atoms = {}, {}, set(), {}, {}
            self.on_device.clear()
        self.on_device.difference_update(deleted, digests, lost, missing)
        for name in [*deleted, *digests]:
            self.digests.pop(name, None)
            self.lost.pop(name, None)
            self.absent.discard(name)
            self.units.pop(name, None)
            self.atoms.pop(name, None)
        self.digests.update(digests)
        for name in lost:
            self.digests.pop(name, None)
            self.units.pop(name, None)
        for name in missing:
            self.digests.pop(name, None)  # made again here, even as the same value, it has to be stored again
        self.lost.update(lost)
        self.lost.update(missing)
        self.absent.update(lost, missing)
        self.words, self.everything = set(), False
        if self._hidden is not None:
            self.settings = self._hidden.values()

    def loaded(self, found: Iterable[Loaded], values: Mapping[str, Any]) -> None:
        """These components of the entry that was adopted are in the namespace now, with these `values`."""
        standing = {name: value for name, value in values.items() if name in self.digests}
        self.atoms.update({name: value for name, value in standing.items() if names.is_atom(value)})
        for component in found:
            unit = component.unit(standing)
            if unit is not None:
                self.units.update(dict.fromkeys(unit.names, unit))
        self.latest, self.from_log = self._latest(), True

    def _latest(self) -> dict[str, int]:
        return {name: id(self._user.get(name)) for name in names.LATEST}

    def report(self) -> list[dict[str, Any]]:
        """One row for each component and each lost name: for `%nbos state`. Sizes are bytes of the last capture.
        `note`: what of a replicated value is not."""
        rows: list[dict[str, Any]] = []
        for unit in {id(unit): unit for unit in self.units.values()}.values():
            standing = [name for name in unit.names if self.units.get(name) is unit and name not in self.lost]
            if standing:
                row = {"names": standing, "size": unit.size, "state": "replicated", "reason": unit.exposed}
                rows.append({**row, "note": self._note(standing)})
        rows += [
            {"names": [name], "size": 0, "state": "not replicated", "reason": why} for name, why in self.lost.items()
        ]
        small = [name for name in self.atoms if name in self.digests]
        if small:
            rows.append({"names": small, "size": 0, "state": "replicated", "reason": ""})
        return sorted(rows, key=lambda row: -row["size"])

    def _note(self, some: Iterable[str]) -> str:
        """Python does not show what an lru_cache holds; for a function that it suits, that makes no difference."""
        cached = [name for name in some if type(self._user.get(name)) is functools._lru_cache_wrapper]
        return f"{', '.join(cached)}: the cache is empty after a failover" if cached else ""
