"""A blob's file before it has its name: written now, made safe together with others a moment later.

Guarantees: what `name_them` returned without an error stands under its name and survives a power cut, and a file that
has its name is whole; a draft that is forgotten leaves no file.

Many small `fsync`s cost a commit of the file system's journal each. So the data of a draft starts on its way to the
disk as soon as it is written, and those of one batch are waited for together: the first `fsync` commits for all
(docs/state-store.md has the measurement).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpu_daemon.blobs import Draft
from nbos_cluster.content import address_of_parts

NEW = ".new-"

STEP = 512 * 1024
"""Bytes of a piece that is written and then hashed."""

_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE, include/uapi/linux/fs.h
_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = getattr(_libc, "sync_file_range", None)


class FileDraft(Draft):
    """A temporary file in the folder where the blob belongs; `address` is of what was written, `path` where it will
    stand. Raises OSError."""

    def __init__(self, folder: Path, data: memoryview) -> None:
        self.size, self.handle = data.nbytes, -1
        self.handle, self._name = tempfile.mkstemp(dir=folder, prefix=NEW)
        try:
            # Each piece is hashed after it was written: what changes meanwhile is found here, or by who reads it.
            self.address = address_of_parts(self._written(data))
            self.path = folder / self.address
        except BaseException:
            self.drop()
            raise

    def _written(self, data: memoryview) -> Iterator[memoryview]:
        """The pieces of `data`, each while the processor's cache still has it."""
        done = 0
        while done < data.nbytes:
            size = os.write(self.handle, data[done : done + STEP])
            yield data[done : done + size]
            done += size

    def begin(self) -> None:
        """Have the disk begin with it."""
        if _sync_file_range is not None:
            # Only a hint: what it could not do, `fsync` does, and reports.
            _sync_file_range(self.handle, ctypes.c_int64(0), ctypes.c_int64(self.size), _BEGIN_WRITING)

    def make_safe(self) -> None:
        os.fsync(self.handle)

    def name_it(self) -> None:
        os.replace(self._name, self.path)
        self._close()

    def drop(self) -> None:
        if self.handle >= 0:
            self._close()
            with contextlib.suppress(OSError):
                os.unlink(self._name)

    def _close(self) -> None:
        handle, self.handle = self.handle, -1
        os.close(handle)

    def __del__(self) -> None:
        self.drop()


def name_them(drafts: Iterable[FileDraft]) -> dict[Path, OSError]:
    """Make each safe and give it its name; those that failed. The folder is still to be synced."""
    failed: dict[Path, OSError] = {}
    safe = []
    for draft in drafts:
        try:
            draft.make_safe()
        except OSError as err:
            failed[draft.path] = err
            draft.drop()
        else:
            safe.append(draft)
    for draft in safe:
        try:
            draft.name_it()
        except OSError as err:
            failed[draft.path] = err
            draft.drop()
    return failed
