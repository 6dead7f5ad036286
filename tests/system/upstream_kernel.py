"""A pytest plugin for ipykernel's own tests: every kernel they start is of the kernelspec in NBOS_UPSTREAM_KERNEL.

Loaded with `-p tests.system.upstream_kernel` before any of their modules is imported: their `tests/utils.py` looks up
`jupyter_client.manager.start_new_kernel` when a test asks for a kernel.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from jupyter_client import manager

_start_new_kernel = manager.start_new_kernel


def start_new_kernel(*args: Any, **options: Any) -> Any:
    """As jupyter_client's, with our kernelspec where none is named."""
    options.setdefault("kernel_name", os.environ["NBOS_UPSTREAM_KERNEL"])
    return _start_new_kernel(*args, **options)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cov", action="store_true", help="pytest-cov's, which some of these tests ask for")


def pytest_configure() -> None:
    manager.start_new_kernel = start_new_kernel
