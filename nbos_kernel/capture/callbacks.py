"""matplotlib's registries of callbacks: to be pickled must not change them.

`CallbackRegistry.__getstate__` takes a number from the registry's counter each time, so that a figure nobody touched
would never be pickled alike twice, and would be written again after every cell that names it. Source:
matplotlib/cbook.py.
"""

from __future__ import annotations

import itertools
from typing import Any


def reduce_registry(registry: Any) -> Any:
    reduced = registry.__reduce_ex__(4)
    state = reduced[2] if len(reduced) > 2 else None
    if isinstance(state, dict) and isinstance(state.get("_cid_gen"), int):
        registry._cid_gen = itertools.count(state["_cid_gen"])
    return reduced


REDUCERS = {("matplotlib.cbook", "CallbackRegistry"): reduce_registry}
"""By module and name of the type: matplotlib is not imported for this."""
