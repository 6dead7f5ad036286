"""While the namespace is captured or applied, what the user's own reducers print on this thread goes nowhere.

It would appear below whatever cell was run last, after every cell. Other threads of the user print as ever. The garbage
collector rests meanwhile: pickling and unpickling make many objects and no garbage, and each of its passes would look
through all the user has.
"""

from __future__ import annotations

import gc
import io
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Mute(io.TextIOBase):
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread and self._stream is not None:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if threading.get_ident() != self._thread and self._stream is not None:
            self._stream.flush()


@contextmanager
def quiet() -> Iterator[None]:
    """Mute stdout and stderr for this thread, and warnings; afterwards the streams are the ones from before."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Mute(out), _Mute(err)
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout, sys.stderr = out, err
        if collecting:
            gc.enable()
