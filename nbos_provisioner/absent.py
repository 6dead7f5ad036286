"""What the router says for a kernel none of whose replicas is there yet, while their hosts say why. No IO, no clock.

Jupyter Server opens no websocket before somebody answers `kernel_info`, and a front end without one shows 'Connecting':
nobody would see that an image is on its way, or missing. So after a while the router answers that itself; cells may
then be sent, and their outputs say what they wait for.
"""

from __future__ import annotations

from typing import Any

ALONE = 2.0
"""Seconds without any replica after which the router answers."""

KERNEL_INFO: dict[str, Any] = {
    "status": "ok",
    "protocol_version": "5.3",
    "implementation": "ipython",
    "implementation_version": "",
    "banner": "An NBOS kernel whose replicas are being started",
    "help_links": [],
    "language_info": {
        "name": "python",
        "version": "3",
        "mimetype": "text/x-python",
        "file_extension": ".py",
        "pygments_lexer": "ipython3",
        "codemirror_mode": {"name": "ipython", "version": 3},
        "nbconvert_exporter": "python",
    },
    "supported_features": ["debugger"],
}


class Absence:
    """Since when nobody is there, though the members' daemons say why."""

    def __init__(self) -> None:
        self.answers_at: float | None = None

    def over(self, explained: bool, now: float) -> bool:
        """Whether it has lasted long enough. explained: nobody is there, and there is a reason to tell."""
        if not explained:
            self.answers_at = None
            return False
        if self.answers_at is None:
            self.answers_at = now + ALONE
        return now >= self.answers_at
