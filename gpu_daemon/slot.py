"""A slot: the folder of a container that waits, and the line to what waits in it.

Guarantees: what is mounted into the container is the folder `d` alone, with the check and, until somebody has
connected, the socket; when the container becomes a replica, the folder moves to the replica's with the daemon's socket
in it, and the container sees that at once; a line is used for one assignment and is closed with it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from gpu_daemon.container_spec import SPARE_SOCKET, TAKEN
from gpu_daemon.containers import put_check
from gpu_daemon.warm_process import LONGEST, NotWarm, Ready, hand_over, read_ready, waits


class Slot:
    """folder: its own, below the run directory. `make` it, or take up one that is there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self._line: socket.socket | None = None

    @staticmethod
    def make(slots: Path) -> Slot:
        folder = slots / secrets.token_hex(4)
        folder.mkdir(mode=0o700, parents=True)
        (own := folder / "d").mkdir()
        own.chmod(0o755)
        put_check(own)
        return Slot(folder)

    @property
    def own(self) -> Path:
        """What the container sees."""
        return self.folder / "d"

    def listen(self) -> socket.socket:
        """The socket at which the container will report; for `ready`. Raises OSError."""
        path = self.own / SPARE_SOCKET
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(str(path))
            # Whatever user the container has; nobody else gets to the folder.
            path.chmod(0o666)
            listener.listen(1)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        return listener

    async def ready(self, listener: socket.socket) -> Ready:
        """Once it has imported all. Closes `listener`. Raises NotWarm when it ends meanwhile; waits for ever."""
        loop = asyncio.get_running_loop()
        try:
            self._line, _ = await loop.sock_accept(listener)
        finally:
            listener.close()
            (self.own / SPARE_SOCKET).unlink(missing_ok=True)
        self._line.setblocking(False)
        try:
            data = await loop.sock_recv(self._line, LONGEST)
        except ConnectionError:
            data = b""
        if not data:
            raise NotWarm("it ended while it imported")
        return read_ready(data)

    def fileno(self) -> int:
        """Of the line: it can be read only when the container has ended."""
        assert self._line is not None
        return self._line.fileno()

    def alive(self) -> bool:
        return self._line is not None and waits(self._line)

    def take(self) -> None:
        """It is to become a replica. Should the daemon die before it is told so, it ends, and waits for no other."""
        (self.own / TAKEN).touch()

    def move_to(self, replica: Path) -> None:
        """The replica's folder gets what the container sees; the daemon's socket there moves into it. Blocking.

        Raises OSError; the socket is then where it was.
        """
        theirs, aside = replica / "d", self.folder / "before"
        os.rename(theirs, aside)
        try:
            os.rename(aside / "s", self.own / "s")
            os.rename(self.own, theirs)
        except OSError:
            if (self.own / "s").exists():
                os.rename(self.own / "s", aside / "s")
            os.rename(aside, theirs)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)

    def assign(self, assignment: Mapping[str, object]) -> None:
        """It becomes a replica. Raises OSError when it is gone."""
        assert self._line is not None
        line, self._line = self._line, None
        hand_over(line, assignment)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
