"""The blob store: large values by content hash, in a namespace per owner.

Guarantees: a blob that `put` returned for is on the disk; what `get` returns has the hash it was asked for; nobody
reaches another owner's blobs, since the owner is part of the path and comes from the kernel's record, never from a
replica. A full disk, a missing and a corrupt blob are different errors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nbos_cluster.wire import BLOB_CHUNK

_HASH = re.compile(r"[0-9a-f]{64}")


class BlobError(RuntimeError):
    """A blob could not be stored or read. `code` goes to the replica."""

    code = "failed"


class BlobMissing(BlobError):
    code = "missing"


class BlobCorrupt(BlobError):
    code = "corrupt"


class BlobRefused(BlobError):
    """The request itself is wrong: no SHA-256 name, another hash than the name, or too large."""

    code = "refused"


class BlobStoreFull(BlobError):
    code = "full"


class BlobStore(ABC):
    """What the daemon needs of a store. Called from worker threads, several at once; every call may block on IO."""

    @abstractmethod
    def put(self, owner: str, digest: str, data: bytes) -> None:
        """Store `data` under its SHA-256 `digest` (hex). Called for each `put_blob`; storing twice is no error.

        Raises BlobRefused when the bytes have another hash, BlobStoreFull when there is no room.
        """

    @abstractmethod
    def get(self, owner: str, digest: str) -> bytes:
        """The bytes. Called for each `get_blob`. Raises BlobMissing or BlobCorrupt."""


class DirectoryStore(BlobStore):
    """Blobs as files `<root>/<owner>/<first two digits>/<hash>`, on a disk that all hosts share (or one host)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, owner: str, digest: str, data: bytes) -> None:
        path = self._path(owner, digest)
        if len(data) > BLOB_CHUNK:
            raise BlobRefused(f"a blob has {len(data)} bytes, at most {BLOB_CHUNK} are taken; cut it into several")
        actual = hashlib.sha256(data).hexdigest()
        if actual != digest:
            raise BlobRefused(f"the bytes sent as blob {digest} have the SHA-256 {actual}")
        if path.exists() and path.stat().st_size == len(data):
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(path, data)
        except OSError as err:
            if err.errno in (errno.ENOSPC, errno.EDQUOT):
                raise BlobStoreFull(f"no room for a blob of {len(data)} bytes in {self.root}: {err.strerror}") from err
            raise BlobError(f"blob {digest} could not be stored: {err}") from err

    def get(self, owner: str, digest: str) -> bytes:
        path = self._path(owner, digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise BlobMissing(f"blob {digest} of {owner} is not in the store") from None
        except OSError as err:
            raise BlobError(f"blob {digest} could not be read: {err}") from err
        if hashlib.sha256(data).hexdigest() != digest:
            # Out of the way, so that a replica that still has the value can store it again.
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".corrupt"))
            raise BlobCorrupt(f"blob {digest} of {owner} is damaged in the store")
        return data

    def _path(self, owner: str, digest: str) -> Path:
        if not isinstance(digest, str) or not _HASH.fullmatch(digest):
            raise BlobRefused(f"{str(digest)[:80]!r} is no SHA-256 in hexadecimal digits")
        # A user name may hold anything; its hash is a safe folder name, and two users never share one.
        folder = hashlib.sha256(owner.encode()).hexdigest()[:32]
        return self.root / folder / digest[:2] / digest


def open_store(url: str) -> BlobStore:
    """The store that `url` names: `file:///path`, or just a path."""
    parts = urlsplit(url)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        raise ValueError(f"blob store {url!r} is not known; use file:///path of a folder that all hosts share")
    if not parts.path.startswith("/"):
        raise ValueError(f"blob store {url!r} needs an absolute path")
    return DirectoryStore(Path(unquote(parts.path)))


def _write(path: Path, data: bytes) -> None:
    """All or nothing, also over a power cut: a temporary file, fsync, rename, fsync of the folder."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
