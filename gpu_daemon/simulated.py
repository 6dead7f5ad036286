"""GPUs that are played: for machines without one, so that everything but CUDA itself can be tried and tested.

They are marked `simulated` wherever they are shown; user code that asks for one gets a grant, not a device.
"""

from __future__ import annotations

from uuid import NAMESPACE_URL, uuid5

from nbos_cluster.records import Device


def simulated(host: str, count: int, model: str, tpcs: int, memory: int) -> tuple[Device, ...]:
    """`count` devices of one model. The same host name always gets the same UUIDs, as real devices keep theirs."""
    if count < 0 or tpcs < 1 or memory < 1:
        raise ValueError(f"cannot simulate {count} devices with {tpcs} TPCs and {memory} bytes of memory")
    return tuple(
        Device(
            uuid=f"SIM-{uuid5(NAMESPACE_URL, f'nbos:{host}/{index}')}",
            index=index,
            model=model,
            tpcs=tpcs,
            memory=memory,
            kind="simulated",
        )
        for index in range(count)
    )
