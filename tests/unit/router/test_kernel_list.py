"""The Jupyter Server's list of kernels while one of them is being started."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager
from tornado import web

from nbos_provisioner.kernelmanager import NBOSKernelManager


def test_a_kernel_without_a_state_yet_is_not_listed_and_costs_no_other() -> None:
    manager = NBOSKernelManager()
    assert manager.kernel_manager_class.endswith(ServerKernelManager.__name__), "what the server makes"
    started, ready = ServerKernelManager(kernel_name="a"), ServerKernelManager(kernel_name="b")
    ready.execution_state, ready.last_activity = "idle", datetime(2026, 1, 1, tzinfo=UTC)
    manager._kernels = {"started": started, "ready": ready}
    assert [model["id"] for model in manager.list_kernels()] == ["ready"]
    with pytest.raises(web.HTTPError, match="being started"):
        manager.kernel_model("started")
    started.execution_state, started.last_activity = "starting", ready.last_activity
    assert [model["execution_state"] for model in manager.list_kernels()] == ["starting", "idle"]
