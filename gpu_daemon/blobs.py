"""The blob store: large values by content, in a namespace per owner. Interface, errors, and which one a URL names.

Guarantees of every store: a blob that was written and settled survives a power cut; what is read has the hash it was
asked for; nobody reaches another owner's blobs, since the owner is part of the path and comes from the kernel's
record, never from a replica. A full disk, a missing blob, a damaged one and a store that is away are different errors,
and each text names the thing, the limit and the way out.

Who may be deleted is not decided here: see `collecting`.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nbos_cluster.content import is_address
from nbos_cluster.wire import BLOB_CHUNK

FOLDER = re.compile(r"[0-9a-f]{32}")


class BlobError(RuntimeError):
    """A blob could not be stored or read. `code` goes to the replica."""

    code = "failed"


class BlobMissing(BlobError):
    code = "missing"


class BlobCorrupt(BlobError):
    code = "corrupt"


class BlobRefused(BlobError):
    """The request itself is wrong: no address, other bytes than the address says, or too large."""

    code = "refused"


class BlobStoreFull(BlobError):
    code = "full"


class BlobStoreAway(BlobError):
    """The store does not answer. What is in it is not lost; worth repeating."""

    code = "away"


@dataclass(frozen=True, slots=True)
class Stored:
    """Something in the store: its address, or '' for what is no blob any more (set aside, half written). at: when it
    was last put or touched, by the store's own clock. condemned: a collection has set it aside, to be deleted later."""

    key: str
    address: str
    size: int
    at: float
    condemned: bool = False


class Draft:
    """Bytes that were written and are no blob yet. Whoever forgets it, forgets them."""


class BlobStore(ABC):
    """What the daemon needs of a store. Called from worker threads, several at once; every call may block on IO, and
    raises BlobStoreAway when the store does not answer."""

    where: str
    """The store in words, for errors."""

    @abstractmethod
    def write(self, owner: str, digest: str, data: bytes | memoryview) -> Draft | None:
        """Check `data` against its address and write it down; `data` may change afterwards. It is a blob, whole and
        safe from a power cut, once `settle` was given what this returned (None: it is that already). What is there
        already counts as put anew (`Stored.at`).

        Raises BlobRefused when the bytes have another address, BlobStoreFull when there is no room.
        """

    @abstractmethod
    def write_unnamed(self, owner: str, data: bytes | memoryview) -> tuple[str, Draft | None]:
        """`write` for whoever does not know the address yet: it comes first in the result, and is of what was written
        down."""

    @abstractmethod
    def settle(self, owner: str, written: Iterable[tuple[str, Draft | None]]) -> dict[str, BlobError]:
        """Make blobs of what was written under these addresses. Those that failed, with the error; raises when all
        did."""

    @abstractmethod
    def read_into(self, owner: str, digest: str, target: memoryview) -> int:
        """Read the blob into the beginning of `target` and say how long it is. Raises BlobMissing, BlobCorrupt, or
        BlobRefused when it is longer than `target`."""

    @abstractmethod
    def get(self, owner: str, digest: str) -> bytes:
        """The blob. Raises BlobMissing or BlobCorrupt."""

    @abstractmethod
    def have(self, owner: str, digests: Iterable[str]) -> set[str]:
        """Which of them are there. Those stay for one period of grace at least, whether anything names them or not."""

    hands_out_files = False
    """Whether `open_files` gives descriptors."""

    def open_files(self, owner: str, digests: Sequence[str]) -> list[int | None]:
        """A descriptor for reading each, of a file that holds the blob and nothing else; None for what cannot be had so
        now (`read_into` says why). The bytes are not checked: whoever reads them does."""
        return [None] * len(digests)

    def free(self) -> int | None:
        """Bytes that can still be stored; None where there is no such bound, or nobody can tell."""
        return None

    # -- for the collection -------------------------------------------------------------------------------------------

    @abstractmethod
    def folders(self) -> list[str]:
        """The namespaces that are there, as `folder_of` names them."""

    @abstractmethod
    def contents(self, folder: str) -> Iterator[Stored]:
        """Everything in a namespace."""

    @abstractmethod
    def now(self) -> float:
        """The clock that `Stored.at` is taken from."""

    @abstractmethod
    def condemn(self, folder: str, found: Stored) -> None:
        """Take a blob that nothing names out of use. A store that can sets it aside, so that it comes back when it is
        wanted after all, and `remove` ends it in a later collection; one that cannot deletes it."""

    @abstractmethod
    def remove(self, folder: str, found: Stored) -> None:
        """Delete what was condemned or is no blob."""

    @abstractmethod
    def restore(self, folder: str, found: Stored) -> None:
        """A condemned blob is wanted after all."""

    @abstractmethod
    def identity(self, propose: str) -> str:
        """Which cluster the store belongs to; `propose` when it belonged to none until now."""

    # -- the same for all ---------------------------------------------------------------------------------------------

    def put(self, owner: str, digest: str, data: bytes | memoryview) -> None:
        """Write and settle."""
        failed = self.settle(owner, [(digest, self.write(owner, digest, data))])
        if failed:
            raise failed[digest]


def folder_of(owner: str) -> str:
    """The owner's namespace. A user name may hold anything; its hash is a safe name, and two users never share one."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


def check_address(digest: object) -> str:
    if not isinstance(digest, str) or not is_address(digest):
        raise BlobRefused(f"{str(digest)[:80]!r} is no BLAKE3 address of 64 hexadecimal digits")
    return digest


def check_size(size: int) -> None:
    if size > BLOB_CHUNK:
        raise BlobRefused(f"a blob has {size} bytes, at most {BLOB_CHUNK} are taken; cut it into several")


def wrong_bytes(digest: str, actual: str) -> BlobRefused:
    return BlobRefused(f"the bytes sent as blob {digest} have the address {actual}; they changed while they were sent")


def missing(where: str, digest: str, why: str = "") -> BlobMissing:
    return BlobMissing(f"blob {digest[:12]}… is not in {where}{why}; run the cell that made the value again")


def damaged(where: str, digest: str, how: str = "its bytes have another hash") -> BlobCorrupt:
    return BlobCorrupt(
        f"blob {digest[:12]}… is damaged in {where} ({how}) and was set aside; run the cell that made the value again"
    )


def too_long(digest: str, size: int, room: int) -> BlobRefused:
    return BlobRefused(f"blob {digest[:12]}… has {size} bytes, the place given for it {room}")


def open_store(url: str, options: Mapping[str, str] | None = None) -> BlobStore:
    """The store that `url` names: `file:///path` or just a path, or `s3://bucket/prefix` with `options` of obstore's
    S3Store (endpoint, region, access_key_id, …; what is not there comes from the environment, AWS_…)."""
    parts = urlsplit(url)
    if parts.scheme == "s3":
        from gpu_daemon.s3_store import S3Store

        return S3Store(parts.netloc, unquote(parts.path).strip("/"), options or {})
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"blob store {url!r} is not known; use file:///path of a folder that all hosts share, or s3://bucket/prefix"
        )
    if not parts.path.startswith("/"):
        raise ValueError(f"blob store {url!r} needs an absolute path")
    from gpu_daemon.directory_store import DirectoryStore

    return DirectoryStore(Path(unquote(parts.path)))
