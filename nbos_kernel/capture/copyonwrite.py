"""pandas' copy-on-write survives: frames, series and indexes that lazily share memory still know of each other.

Since pandas 3 `s = df["x"]` shares the frame's memory until one of the two is written to, which then copies first. Who
shares is kept in a `BlockValuesRefs` beside the values, and pandas' own pickle drops it. Since the memory itself stays
shared over a pickle (`arrays.py`), a later write to one would change the other. So the `BlockValuesRefs` travels
along, where more than one object is registered in it. Sources: pandas/_libs/internals.pyx, core/internals/blocks.py.
"""

from __future__ import annotations

import importlib
from typing import Any


def reduce_manager(manager: Any) -> Any:
    """The manager of a frame's or a series' blocks."""
    reduced = manager.__reduce_ex__(4)
    sharers = tuple(_shared(getattr(block, "refs", None)) for block in manager.blocks)
    if not any(sharers):
        return reduced
    state = (reduced[2] if len(reduced) > 2 else None, sharers)
    return (reduced[0], reduced[1], state, None, None, set_manager)


def set_manager(manager: Any, state: Any) -> None:
    own, sharers = state
    if own is not None:
        manager.__setstate__(own)
    for block, refs in zip(manager.blocks, sharers, strict=True):
        if refs is not None:
            block.refs = refs
            refs.add_reference(block)


def reduce_index(index: Any) -> Any:
    reduced = index.__reduce_ex__(4)
    refs = _shared(getattr(index, "_references", None))
    if refs is None or (len(reduced) > 2 and reduced[2] is not None):
        return reduced
    return (reduced[0], reduced[1], refs, None, None, set_index)


def set_index(index: Any, refs: Any) -> None:
    index._references = refs
    refs.add_index_reference(index)


def _shared(refs: Any) -> Any:
    """It, when somebody else is registered in it too."""
    return refs if refs is not None and hasattr(refs, "add_reference") and refs.has_reference() else None


def reduce_refs(refs: Any) -> Any:
    return make_refs, ()


def make_refs() -> Any:
    return importlib.import_module("pandas._libs.internals").BlockValuesRefs()


def reduce_frame(frame: Any) -> Any:
    """A frame or series, without the list of attributes' names that its class keeps for all of them: in two pickles it
    would pass for something that these two share."""
    reduced = frame.__reduce_ex__(4)
    state = reduced[2] if len(reduced) > 2 else None
    if type(state) is not dict or state.get("_metadata") is not getattr(type(frame), "_metadata", None):
        return reduced
    return (*reduced[:2], {key: value for key, value in state.items() if key != "_metadata"}, *reduced[3:])


_INDEXES = ("Index", "DatetimeIndex", "TimedeltaIndex", "PeriodIndex", "CategoricalIndex", "IntervalIndex")
"""Those with memory of their own (a RangeIndex has none, a MultiIndex consists of others)."""

REDUCERS = {
    ("pandas.core.internals.managers", "BlockManager"): reduce_manager,
    ("pandas.core.internals.managers", "SingleBlockManager"): reduce_manager,
    ("pandas._libs.internals", "BlockValuesRefs"): reduce_refs,
    **{("pandas", name): reduce_frame for name in ("DataFrame", "Series")},
    ("pandas.core.frame", "DataFrame"): reduce_frame,
    ("pandas.core.series", "Series"): reduce_frame,
    **{(module, name): reduce_index for name in _INDEXES for module in ("pandas", "pandas.core.indexes.base")},
}
"""By module and name of the type: pandas is not imported for this."""
