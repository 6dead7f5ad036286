"""The JupyterHub scopes with which NBOS is used: to reach the service, and to have kernels there."""

from __future__ import annotations

SERVICE = "nbos"

ACCESS = f"access:services!service={SERVICE}"
"""To reach the gateway and the dashboard, and to see there what the user may see."""

KERNELS = "custom:nbos:kernels"
"""To make kernels of one's own, to get their keys, to restart and delete them. Defined in the drop-in configuration."""

METRICS = "read:metrics"
"""To read the metrics of the Hub, and of the gateway."""

ADMIN = "admin:users"
"""Who has it, unfiltered, sees and ends everybody's kernels. A single-user server's token never has it."""
