"""Blobs as files `<root>/<owner>/<address>`, on a disk that all hosts share (NFS), or one host has.

Guarantees, besides those of every store: a file is whole and safe before it has its name, and is never changed once
it has it. The page cache holds the newest blobs, for standbys that will read them, and no others. A blob that the
collection condemned is `<address>.old` for one more period of grace, and comes back by itself when anybody reads, puts
or asks for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gpu_daemon.blobs import (
    FOLDER,
    BlobError,
    BlobMissing,
    BlobStore,
    BlobStoreAway,
    BlobStoreFull,
    Draft,
    Stored,
    check_address,
    check_size,
    damaged,
    folder_of,
    missing,
    too_long,
    wrong_bytes,
)
from gpu_daemon.drafts import NEW, FileDraft, name_them
from gpu_daemon.filesystems import is_local
from nbos_cluster.content import address, address_of_parts, is_address

OLD, DAMAGED = ".old", ".corrupt"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_AWAY = (errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.ENETUNREACH, errno.EREMOTEIO)


RECENT = 1 << 30
"""Bytes of the newest blobs that stay in the page cache. What is older leaves it, so that a store does not push out
everybody else's files, and writes go to memory that is warm (in a virtual machine new memory costs ten times more)."""


STEP = 1 << 20


class DirectoryStore(BlobStore):
    def __init__(self, root: Path) -> None:
        self._recent: deque[tuple[Path, int]] = deque()
        self._recent_bytes = 0
        self._lock = threading.Lock()
        self._known: set[Path] = set()
        self.root = root
        self.where = f"the blob store {root}"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not from another machine's disk: a replica that waits for one cannot be told that it is away, nor be ended.
        self.hands_out_files = is_local(root)

    # -- blobs --------------------------------------------------------------------------------------------------------

    def write(self, owner: str, digest: str, data: bytes | memoryview) -> FileDraft | None:
        path, size = self._path(owner, digest), memoryview(data).nbytes
        check_size(size)
        try:
            if self._touch(path, size) and self._sound(path):
                return None
            draft = self._draft(path.parent, data)
            if draft.address != digest:
                draft.drop()
                raise wrong_bytes(digest, draft.address)
            self._started(draft)
            return draft
        except OSError as err:
            raise self._failed(f"blob {digest[:12]}… of {size} bytes could not be stored", err) from err

    def write_unnamed(self, owner: str, data: bytes | memoryview) -> tuple[str, FileDraft | None]:
        size = memoryview(data).nbytes
        check_size(size)
        try:
            draft = self._draft(self.root / folder_of(owner), data)
            if self._touch(draft.path, size) and self._sound(draft.path):
                draft.drop()
                return draft.address, None
            self._started(draft)
            return draft.address, draft
        except OSError as err:
            raise self._failed(f"a blob of {size} bytes could not be stored", err) from err

    def settle(self, owner: str, written: Iterable[tuple[str, Draft | None]]) -> dict[str, BlobError]:
        written = list(written)
        failed = name_them(draft for _, draft in written if isinstance(draft, FileDraft))
        folders = {self._path(owner, digest).parent for digest, _ in written}
        try:
            for folder in folders:
                _sync_folder(folder)
            if folders - self._known:
                # New folders are names too.
                _sync_folder(self.root)
                self._known |= folders
        except OSError as err:
            raise self._failed("blobs could not be made safe", err) from err
        return {
            path.name: self._failed(f"blob {path.name[:12]}… could not be made safe", err)
            for path, err in failed.items()
        }

    def read_into(self, owner: str, digest: str, target: memoryview) -> int:
        path = self._path(owner, digest)
        with self._reading(path, digest) as file:
            size = os.fstat(file).st_size
            if size > target.nbytes:
                raise too_long(digest, size, target.nbytes)
            done = 0
            while done < size and (got := os.preadv(file, [target[done:size]], done)):
                done += got
        if done != size or address(target[:size]) != digest:
            self._set_aside(path)
            raise damaged(self.where, digest)
        return size

    def get(self, owner: str, digest: str) -> bytes:
        path = self._path(owner, digest)
        with self._reading(path, digest) as file, open(file, "rb", closefd=False) as whole:
            data = whole.read()
        if address(data) != digest:
            self._set_aside(path)
            raise damaged(self.where, digest)
        return data

    def open_files(self, owner: str, digests: Sequence[str]) -> list[int | None]:
        return [self._handle(self._path(owner, digest), digest) for digest in digests]

    def have(self, owner: str, digests: Iterable[str]) -> set[str]:
        there = set()
        for digest in digests:
            path = self._path(owner, digest)
            try:
                if self._touch(path, None):
                    there.add(digest)
            except OSError as err:
                raise self._failed(f"blob {digest[:12]}… could not be looked up", err) from err
        return there

    def free(self) -> int | None:
        try:
            stat = os.statvfs(self.root)
        except OSError as err:
            raise self._failed("the room left could not be looked up", err) from err
        return stat.f_bavail * stat.f_frsize

    # -- collection ---------------------------------------------------------------------------------------------------

    def folders(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root) if FOLDER.fullmatch(name))
        except OSError as err:
            raise self._failed("the namespaces could not be listed", err) from err

    def contents(self, folder: str) -> Iterator[Stored]:
        try:
            with os.scandir(self.root / folder) as found:
                for item in found:
                    with contextlib.suppress(FileNotFoundError):
                        stat = item.stat(follow_symlinks=False)
                        yield _stored(item.name, stat.st_size, stat.st_mtime)
        except OSError as err:
            raise self._failed("the blobs could not be listed", err) from err

    def now(self) -> float:
        """By the file server's clock, not ours."""
        path = self.root / ".clock"
        try:
            path.touch(mode=0o600)
            os.utime(path)
            return path.stat().st_mtime
        except OSError as err:
            raise self._failed("the store's clock could not be read", err) from err

    def condemn(self, folder: str, found: Stored) -> None:
        path = self.root / folder / found.key
        aside = path.with_name(path.name + OLD)
        try:
            # The time of condemnation first: the pass after next counts from it.
            os.rename(path, aside)
            os.utime(aside)
        except FileNotFoundError:
            return
        except OSError as err:
            raise self._failed(f"blob {found.address[:12]}… could not be set aside", err) from err

    def remove(self, folder: str, found: Stored) -> None:
        try:
            (self.root / folder / found.key).unlink(missing_ok=True)
        except OSError as err:
            raise self._failed(f"{found.key} could not be deleted", err) from err

    def restore(self, folder: str, found: Stored) -> None:
        path = self.root / folder / found.key
        self._bring_back(path.with_name(found.address))

    def identity(self, propose: str) -> str:
        path = self.root / "cluster"
        try:
            handle, name = tempfile.mkstemp(dir=self.root, prefix=NEW)
            with os.fdopen(handle, "w") as file:
                file.write(propose)
            try:
                os.link(name, path)
            except FileExistsError:
                return path.read_text()
            finally:
                os.unlink(name)
            return propose
        except OSError as err:
            raise self._failed("the store's identity could not be read", err) from err

    # -- files --------------------------------------------------------------------------------------------------------

    def _path(self, owner: str, digest: str) -> Path:
        check_address(digest)
        return self.root / folder_of(owner) / digest

    def _touch(self, path: Path, size: int | None) -> bool:
        """Whether it is there (with `size` bytes); from now on it counts as new."""
        for _ in range(2):
            try:
                if size is not None and path.stat().st_size != size:
                    return False
                os.utime(path)
                return True
            except FileNotFoundError:
                if not self._bring_back(path):
                    return False
        return False

    def _sound(self, path: Path) -> bool:
        """Whether what stands there already is what its name says; set aside otherwise."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            sound = _address_in(file) == path.name
        except OSError as err:
            if err.errno != errno.EIO:
                raise
            sound = False
        finally:
            os.close(file)
        if not sound:
            self._set_aside(path)
        return sound

    def _bring_back(self, path: Path) -> bool:
        """A blob that was condemned and is wanted again."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(path.with_name(path.name + OLD), path)
            return True
        return path.exists()

    @contextlib.contextmanager
    def _reading(self, path: Path, digest: str) -> Iterator[int]:
        try:
            file = self._open(path, digest)
            try:
                yield file
            finally:
                os.close(file)
        except OSError as err:
            if err.errno == errno.EIO:
                # The disk says itself that it cannot give these bytes back.
                self._set_aside(path)
                raise damaged(self.where, digest, "the disk cannot read it: " + os.strerror(errno.EIO)) from err
            raise self._failed(f"blob {digest[:12]}… could not be read", err) from err

    def _open(self, path: Path, digest: str) -> int:
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            if not self._bring_back(path):
                break
        damaged_before = path.with_name(path.name + DAMAGED).exists()
        raise missing(self.where, digest, " any more: it was damaged there and set aside" if damaged_before else "")

    def _handle(self, path: Path, digest: str) -> int | None:
        try:
            return self._open(path, digest)
        except (OSError, BlobMissing):
            return None

    def _draft(self, folder: Path, data: bytes | memoryview) -> FileDraft:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return FileDraft(folder, memoryview(data).cast("B"))

    def _started(self, draft: FileDraft) -> None:
        """It is wanted: the disk begins with it, and standbys will read it."""
        draft.begin()
        self._note_recent(draft.path, draft.size)

    def _set_aside(self, path: Path) -> None:
        """Out of the way, so that a replica that still has the value can store it again."""
        with contextlib.suppress(OSError):
            path.rename(path.with_name(path.name + DAMAGED))

    def _note_recent(self, path: Path, size: int) -> None:
        with self._lock:
            self._recent.append((path, size))
            self._recent_bytes += size
            leave = []
            while self._recent_bytes > RECENT:
                leave.append(self._recent.popleft())
                self._recent_bytes -= leave[-1][1]
        for old, _ in leave:
            with contextlib.suppress(OSError):
                file = os.open(old, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(file)

    def _failed(self, what: str, err: OSError) -> BlobError:
        if err.errno in _FULL:
            return BlobStoreFull(
                f"{what}: {self.where} is full ({self._room()}); delete kernels or files, or enlarge it"
            )
        if err.errno in _AWAY:
            return BlobStoreAway(f"{what}: {self.where} does not answer ({err.strerror}); it is tried again")
        return BlobError(f"{what} in {self.where}: {err.strerror or err}; see the daemon's log on its host")

    def _room(self) -> str:
        try:
            stat = os.statvfs(self.root)
        except OSError as err:
            return str(err.strerror)
        free, size = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
        return f"{free / 1e6:,.1f} MB free of {size / 1e6:,.1f} MB"


def _stored(name: str, size: int, at: float) -> Stored:
    base = name.removesuffix(OLD)
    if not is_address(base):
        return Stored(name, "", size, at)
    return Stored(name, base, size, at, condemned=base != name)


def _address_in(handle: int) -> str:
    """Read, not mapped: where a disk cannot read, reading fails and looking at mapped memory ends the process."""
    return address_of_parts(iter(lambda: os.read(handle, STEP), b""))


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
