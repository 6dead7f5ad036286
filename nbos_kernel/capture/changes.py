"""What a cell changed in the namespace, against what the log holds.

Guarantees: `Capture.changes()` looks at every variable, whatever way it was changed; it neither prints nor
raises, however the values behave; a value that cannot be pickled costs its own name only, with the reason.
Nothing is remembered until `accept()`, so that a capture whose execution was not claimed is simply forgotten.

Cost: values that can neither change nor share are compared by identity. Everything else is pickled and compared
by digest.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbos_cluster import wire

from . import arrays, groups, names
from .pickling import Pickled, Roots, dump
from .quiet import quiet

_ABSENT = object()
_UNNAMED = object()

ATOMS_ALONE = 256
OBJECTS_ALONE = 1024
"""Up to so many new plain values, and so many objects, each stands in a component of its own. Beyond it an entry could
not name them all, so they are put together, always the same names."""


@dataclass(frozen=True)
class FrameData:
    """A run of bytes of a component and the sha256 of each of its chunks of wire.BLOB_CHUNK."""

    data: bytes | memoryview
    hashes: tuple[str, ...]

    @property
    def size(self) -> int:
        return memoryview(self.data).nbytes

    def chunks(self) -> Iterable[tuple[str, memoryview]]:
        view = memoryview(self.data).cast("B")
        for number, digest in enumerate(self.hashes):
            yield digest, view[number * wire.BLOB_CHUNK : (number + 1) * wire.BLOB_CHUNK]


@dataclass(frozen=True)
class Packed:
    """Variables pickled together. The digest covers names, stream and buffers."""

    names: tuple[str, ...]
    digest: str
    frames: tuple[FrameData, ...]


@dataclass
class Changes:
    """What has to be written: components anew or changed, names gone, names that newly cannot be replicated."""

    components: list[Packed] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    atoms: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.components or self.deleted or self.lost)


class Capture:
    """`variables()` gives the user's (name, value) pairs at this moment."""

    def __init__(self, roots: Roots, variables: Callable[[], Iterable[tuple[str, Any]]]) -> None:
        self._roots, self._variables = roots, variables
        self._atoms: dict[str, Any] = {}  # the very objects the log holds, kept so that identity means something
        self._digests: dict[str, str] = {}  # of the component each name stands in
        self._absent: set[str] = set()  # names this replica never had: not being there is no deletion
        self.lost: dict[str, str] = {}

    def note_source(self, code: str) -> None:
        """Remember which submodules the cell imports by name: the variable it binds is only the package."""
        if "import" not in code or "." not in code:
            return
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return  # the cell says so itself
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._roots.imported.update(alias.name for alias in node.names if "." in alias.name)

    def changes(self) -> Changes:
        """Compare the namespace with what the log holds."""
        found = Changes()
        with quiet():
            current = dict(self._variables())
            for name in [name for name in current if not names.writable(name)]:
                label, reason = names.label(name), names.why_not_writable(name)
                current.pop(name)
                current[label] = _UNNAMED
                if self.lost.get(label) != reason:
                    found.lost[label] = reason
            fresh: dict[str, Any] = {}
            objects: dict[str, Any] = {}
            for name, value in current.items():
                if value is _UNNAMED:
                    continue
                if self._atoms.get(name, _ABSENT) is value and name in self._digests and not _grew(value, self._roots):
                    found.atoms[name] = value
                elif names.is_atom(value):
                    found.atoms[name] = fresh[name] = value
                else:
                    objects[name] = value
            for group in groups.buckets(fresh, ATOMS_ALONE):
                self._pack_together(group, fresh, arrays.Storages(), found)
            if objects:
                self._pack_objects(objects, found)
        known = (self._digests.keys() | self.lost.keys()) - self._absent
        found.deleted = sorted(known - current.keys())
        return found

    def accept(self, found: Changes) -> None:
        """The changes are in the log (or will be): compare with them from now on."""
        for packed in found.components:
            for name in packed.names:
                self._digests[name] = packed.digest
                self.lost.pop(name, None)
                self._absent.discard(name)
        for name in found.deleted:
            self._digests.pop(name, None)
            self.lost.pop(name, None)
        for name, reason in found.lost.items():
            self._digests.pop(name, None)
            self._absent.discard(name)
            self.lost[name] = reason
        self._atoms = found.atoms

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
            self._digests, self.lost, self._absent = {}, {}, set()
        for name in deleted:
            self._digests.pop(name, None)
            self.lost.pop(name, None)
            self._absent.discard(name)
        for name, digest in digests.items():
            self._digests[name] = digest
            self.lost.pop(name, None)
            self._absent.discard(name)
        for name in lost:
            self._digests.pop(name, None)
        self.lost.update(lost)
        self.lost.update(missing)
        self._absent.update(lost, missing)
        self._atoms = {}

    def note(self, lost: Mapping[str, str]) -> None:
        """Keep these as lost, although they are no variables: they do not end because the namespace lacks them."""
        self.lost.update(lost)
        self._absent.update(lost)

    def forget(self, noted: Iterable[str]) -> None:
        """What `note` said holds no more."""
        for name in noted:
            self.lost.pop(name, None)
            self._absent.discard(name)

    def _pack_together(
        self, group: tuple[str, ...], values: Mapping[str, Any], storages: arrays.Storages, found: Changes
    ) -> None:
        pickled = self._attempt(group, {name: values[name] for name in group}, storages, found)
        if pickled is not None:
            self._emit(group, pickled, found)

    def _pack_objects(self, objects: dict[str, Any], found: Changes) -> None:
        storages = arrays.Storages()
        alone: dict[str, Pickled] = {}
        for name, value in objects.items():
            pickled = self._attempt((name,), {name: value}, storages, found)
            if pickled is not None:
                alone[name] = pickled
        if len(alone) == 1:
            ((name, pickled),) = alone.items()
            self._emit((name,), pickled, found)
            return
        singles: list[str] = []
        for group in groups.groups({name: pickled.shareable() for name, pickled in alone.items()}):
            if len(group) > 1:
                self._pack_together(group, objects, storages, found)
            elif alone[group[0]].buffers:
                self._emit(group, alone[group[0]], found)
            else:
                singles.append(group[0])
        for group in groups.buckets(singles, OBJECTS_ALONE):
            if len(group) == 1:
                self._emit(group, alone[group[0]], found)
            else:
                self._pack_together(group, objects, storages, found)

    def _attempt(
        self, group: tuple[str, ...], values: dict[str, Any], storages: arrays.Storages, found: Changes
    ) -> Pickled | None:
        try:
            return dump(values, self._roots, storages)
        except BaseException as err:  # noqa: BLE001 - the user's __reduce__ may raise anything, SystemExit included
            reason = why_not(err, values[group[0]])
        for name in group:
            if self.lost.get(name) != reason:
                found.lost[name] = reason
        return None

    def _emit(self, group: tuple[str, ...], pickled: Pickled, found: Changes) -> None:
        parts: list[bytes | memoryview] = [pickled.stream, *pickled.buffers]
        frames = tuple(FrameData(data, hashes_of(data)) for data in parts)
        digest = hashlib.blake2b(repr(group).encode(), digest_size=16)
        for frame in frames:
            digest.update("".join(frame.hashes).encode())
        value = digest.hexdigest()
        if any(self._digests.get(name) != value for name in group):
            found.components.append(Packed(group, value, frames))


def hashes_of(data: bytes | memoryview) -> tuple[str, ...]:
    """sha256 of each chunk of wire.BLOB_CHUNK bytes."""
    view = memoryview(data).cast("B")
    return tuple(
        hashlib.sha256(view[at : at + wire.BLOB_CHUNK]).hexdigest() for at in range(0, view.nbytes, wire.BLOB_CHUNK)
    )


def _grew(value: Any, roots: Roots) -> bool:
    """A package of which a cell imported one more submodule is written again."""
    return type(value).__name__ == "module" and bool(roots.imported) and bool(roots.submodules(value.__name__))


def why_not(err: BaseException, value: Any) -> str:
    """One line that tells the user what kind of value it is and why it stays behind."""
    kind = type(value).__qualname__
    if isinstance(err, RecursionError) or isinstance(err.__cause__, RecursionError):
        return f"{kind}: nested too deeply to be pickled"
    if isinstance(err, MemoryError):
        return f"{kind}: not enough memory to pickle it"
    try:
        text = str(err).strip().splitlines()
    except Exception:  # noqa: BLE001 - the user's exception may fail to print itself
        text = []
    reason = f"{kind}: {text[0] if text else type(err).__name__}"[:300]
    return reason.encode("utf-8", "replace").decode()
