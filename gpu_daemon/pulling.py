"""How far the pull of an image is, from the Engine's messages, in words for the user who waits for it. No IO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MB = 1_000_000


@dataclass
class PullProgress:
    """Feed it every message (`take`); `text` says where it stands. `error`: why it failed, '' while it did not."""

    image: str
    error: str = ""
    _layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes there and bytes in all, by layer."""
    _done: set[str] = field(default_factory=set)
    _unpacking: bool = False

    def take(self, message: Mapping[str, Any]) -> None:
        layer, status = str(message.get("id", "")), str(message.get("status", ""))
        if "error" in message:
            self.error = str(message["error"])
        detail = message.get("progressDetail") or {}
        if status == "Downloading" and detail.get("total"):
            self._layers[layer] = (int(detail.get("current", 0)), int(detail["total"]))
        elif status in ("Download complete", "Pull complete") and layer in self._layers:
            self._layers[layer] = (self._layers[layer][1],) * 2
        elif status == "Extracting":
            self._unpacking = True
        if status in ("Pull complete", "Already exists"):
            self._done.add(layer)

    @property
    def text(self) -> str:
        there, total = (sum(column) for column in zip(*self._layers.values(), strict=True)) if self._layers else (0, 0)
        what = f"this host is getting the image {self.image}"
        if total and there < total:
            return f"{what}: {there // MB} of {total // MB} MB so far"
        if self._unpacking or total:
            return f"{what}: it is there and being unpacked"
        return f"{what}: asking its registry"
