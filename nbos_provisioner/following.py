"""Asks the gateway for a kernel's members while the router has nobody to ask: a thread with one plain HTTP request.

Guarantees: at most one request at a time, none while some replica is connected; a gateway that is away is asked again,
less and less often; nothing here ever delays the router's loop. The router asks, and not the provisioner, because a
blocking `KernelManager` runs its event loop only within its own calls.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 35.0
"""Seconds for one answer; the gateway holds it for 25 s at most while no replica is ready."""

FIRST_PAUSE, LAST_PAUSE = 0.5, 10.0


class Follower:
    """`url`: of the kernel at the gateway. `reader` is readable when `found` has something to give."""

    def __init__(self, url: str, token: str, log: Callable[[str], None]) -> None:
        self._url, self._token, self._log = urlsplit(url), token, log
        self.reader, self._writer = os.pipe()
        self._found: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._wanted = threading.Event()
        self._seen = 0
        """Revision of the newest model."""
        threading.Thread(target=self._run, name="membership", daemon=True).start()

    def ask(self) -> None:
        """Have the members asked for, unless that is under way."""
        self._wanted.set()

    def found(self) -> dict[str, Any]:
        """The next KernelModel; call it once each time `reader` is readable."""
        os.read(self.reader, 1)
        return self._found.get()

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self._wanted.wait()
            began = time.monotonic()
            try:
                model = self._get()
            except (OSError, ValueError, http.client.HTTPException) as err:
                self._log(f"the members of this kernel are not known ({err}); asking again in {pause:g} s")
                time.sleep(pause)
                pause = min(pause * 2, LAST_PAUSE)
                continue
            pause = FIRST_PAUSE
            # Before it is handed over: whoever finds it wanting afterwards asks again.
            if any(member.get("state") == "ready" for member in model.get("members", [])):
                self._wanted.clear()
            self._found.put(model)
            os.write(self._writer, b"!")
            # The gateway holds what is less than a ready replica for as long; whatever answers, no more often.
            time.sleep(max(0.0, began + FIRST_PAUSE - time.monotonic()))

    def _get(self) -> dict[str, Any]:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=PATIENCE)
        try:
            # After a model that says why no replica is ready yet, the next one that says something else.
            query = f"?wait=ready&after={self._seen}"
            connection.request("GET", self._url.path + query, headers={"Authorization": f"token {self._token}"})
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(f"HTTP {answer.status} from {self._url.geturl()}: {body[:200].decode(errors='replace')}")
        model = json.loads(body)
        if not isinstance(model, dict):
            raise ValueError(f"{self._url.geturl()} answered with no kernel")
        revision = model.get("revision")
        self._seen = revision if isinstance(revision, int) else 0
        return model
