"""Whether a GPU is of the model that somebody asks for. No IO.

Models are compared by their words, whatever stands between them: `H100`, `h100 pcie` and `A100-SXM4-80GB` name an
`NVIDIA H100 PCIe` and an `NVIDIA A100-SXM4-80GB`; `A10` does not name an A100.
"""

from __future__ import annotations

import functools
import re

_WORD = re.compile(r"[a-z0-9.]+")


def is_model(model: str, wanted: str) -> bool:
    """wanted: words of the model's name in their order, '' for any model."""
    return not wanted or _matches(model, wanted)


@functools.lru_cache(maxsize=1024)  # asked for every device by every bid
def _matches(model: str, wanted: str) -> bool:
    sought = "".join(_WORD.findall(wanted.lower()))
    if not sought:
        return not wanted.strip()
    words = _WORD.findall(model.lower())
    return any(
        "".join(words[start:end]) == sought for start in range(len(words)) for end in range(start + 1, len(words) + 1)
    )
