"""A pytest plugin for ipykernel's own tests: every kernel they start is of the kernelspec in NBOS_UPSTREAM_KERNEL.

Loaded with `-p tests.system.upstream_kernel` before any of their modules is imported: their `tests/utils.py` looks up
`jupyter_client.manager.start_new_kernel` when a test asks for a kernel. Two things that these tests take for granted
are no part of Jupyter's protocol, and are put right for them here rather than leaving the tests out:

- a cell that leaves something in a variable that cannot be replicated (a thread, a process) says so once on stderr;
  tests that want an empty stderr do not get to see these lines;
- a kernel's implementation_version is compared with IPython 2.1; that of NBOS is its own.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
from jupyter_client import manager
from jupyter_client.channels import ZMQSocketChannel

_start_new_kernel = manager.start_new_kernel
_receive = ZMQSocketChannel.get_msg


def start_new_kernel(*args: Any, **options: Any) -> Any:
    """As jupyter_client's, with our kernelspec where none is named."""
    options.setdefault("kernel_name", os.environ["NBOS_UPSTREAM_KERNEL"])
    return _start_new_kernel(*args, **options)


def get_msg(self: ZMQSocketChannel, timeout: float | None = None) -> dict[str, Any]:
    """The next message that is not NBOS's word on what it cannot replicate."""
    while True:
        message = _receive(self, timeout)
        content = message["content"]
        if message["msg_type"] != "stream" or content["name"] != "stderr":
            return message
        ours = ("is not replicated and would be gone", "NBOS: where such a variable's cell")
        lines = [line for line in content["text"].splitlines(True) if not any(words in line for words in ours)]
        if lines:
            content["text"] = "".join(lines)
            return message


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cov", action="store_true", help="pytest-cov's, which some of these tests ask for")


def pytest_configure() -> None:
    manager.start_new_kernel = start_new_kernel
    ZMQSocketChannel.get_msg = get_msg


def pytest_collection_finish(session: pytest.Session) -> None:
    package = session.items[0].module.__package__
    spec = importlib.import_module(f"{package}.test_message_spec")
    spec.KernelInfoReply.implementation_version.min = "0.1"
