"""Whether a kernel may ask for that much of a GPU. No IO. The bounds stand in the kernel's record (`max_resources`)."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_daemon.ledger import GIB, describe, share_of
from nbos_cluster.records import Device, Resources


def over_limit(asked: Resources, limit: Resources, devices: Iterable[Device]) -> str:
    """Why the kernel may not ask for `asked`, or ''. A limit of 0 GPUs or TPCs means none; 0 memory, no bound."""
    if not asked.wants_gpu:
        return ""
    what = describe(asked)
    if not limit.wants_gpu:
        return f"the cell asks for {what}, this kernel may use no GPU; run it with %%cpu, or ask for a larger limit"
    if asked.gpus > limit.gpus:
        return f"the cell asks for {what}, this kernel may use {limit.gpus} whole GPUs; ask for at most that"
    if asked.tpcs > limit.tpcs:
        return f"the cell asks for {what}, this kernel may use slices of {limit.tpcs} TPCs; ask for at most that"
    memory = asked.memory or max((share_of(device, asked) for device in devices), default=0)
    if limit.memory and memory > limit.memory:
        most = f"{limit.memory / GIB:.1f} GiB"
        return (
            f"the cell asks for {what} ({memory / GIB:.1f} GiB a device), this kernel may use {most}; name at most that"
        )
    return ""
