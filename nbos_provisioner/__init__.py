"""In the Jupyter Server: the kernel provisioner, the router, and the extension that finds living kernels again."""

from __future__ import annotations

from typing import Any


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "nbos_provisioner"}]


def _load_jupyter_server_extension(app: Any) -> None:
    # Imported here: the router is part of this package, and must not load the Jupyter Server.
    from .extension import load

    load(app)
