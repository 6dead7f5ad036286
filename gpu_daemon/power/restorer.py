"""A process that puts clocks back when its daemon is gone, however that ended: `python -m gpu_daemon.power.restorer`.

It reads UUIDs, a line each, from its standard input: devices that are about to be locked. The daemon holds the only
other end, so the end of the input is the end of the daemon. Then every device is reset, and the note (its argument)
that names them is deleted, in which the next daemon would find them if this process was killed, too. It leaves SIGTERM
and SIGINT, which a service's stop sends to all of its processes, to the daemon. A line `done`: the daemon has restored
everything itself.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from gpu_daemon.power.clocks import ClockFailed, Clocks, NVMLClocks
from gpu_daemon.power.note import Note

DONE = "done"
LEFT_TO_THE_DAEMON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def restore(clocks: Clocks, uuids: Iterable[str]) -> dict[str, str]:
    """Reset these devices; what could not be, with the reason."""
    failed = {}
    for uuid in uuids:
        try:
            clocks.reset(uuid)
        except ClockFailed as err:
            failed[uuid] = str(err)
    return failed


def main() -> None:
    for number in LEFT_TO_THE_DAEMON:
        signal.signal(number, signal.SIG_IGN)
    import pynvml

    locked: dict[str, None] = {}
    for line in sys.stdin:
        if line.strip() == DONE:
            return
        locked[line.strip()] = None
    note = Note(Path(sys.argv[1]))
    failed = restore(NVMLClocks(pynvml, locked), locked)
    for uuid in locked.keys() - failed.keys():
        note.remove(uuid)
    for text in failed.values():
        print(f"NBOS: clocks stay locked: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
