"""The note in a daemon's run directory that names the devices whose clocks are locked, or may be."""

from __future__ import annotations

from pathlib import Path

from gpu_daemon.rundir import read_json, write_json


class Note:
    """Written before the first lock of a device, and without it after its reset."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> set[str]:
        found = (read_json(self._path) or {}).get("locked")
        return {str(uuid) for uuid in found} if isinstance(found, list) else set()

    def add(self, uuid: str) -> None:
        self._write(self.read() | {uuid})

    def remove(self, uuid: str) -> None:
        self._write(self.read() - {uuid})

    def _write(self, locked: set[str]) -> None:
        if locked:
            write_json(self._path, {"locked": sorted(locked)})
        else:
            self._path.unlink(missing_ok=True)
