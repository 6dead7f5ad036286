"""An S3 server of the test's own (moto) as a child process, which can be stopped, halted and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from typing import Any

import obstore
from obstore.store import S3Store

from tests.system.ports import free_port


class S3Server:
    """Objects are in its memory: they are gone when it was stopped."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = {
            "endpoint": self.url,
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> S3Server:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.make_bucket()
                return self
            except OSError:
                assert time.monotonic() < deadline, "the S3 server does not start"
                time.sleep(0.05)

    def make_bucket(self) -> None:
        request = urllib.request.Request(f"{self.url}/bucket", method="PUT")
        with urllib.request.urlopen(request, timeout=5):
            return

    def flip_a_bit(self, prefix: str, key: str) -> None:
        options: Any = {**self.options, "allow_http": "true"}
        store = S3Store("bucket", prefix=prefix, config=options)
        content = bytearray(obstore.get(store, key).bytes())
        content[0] ^= 1
        obstore.put(store, key, bytes(content))

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
