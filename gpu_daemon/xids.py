"""What an XID says about the device: the mistake of the program that ran, worth a note, or the end of its use. No IO.

Sources: which are the program's own ("application errors: the GPU should still be healthy") is the list of NVIDIA's
k8s-device-plugin, internal/rm/health.go; as there, every XID that nothing is known of ends the device's use. The words
follow NVIDIA's Xid catalogue, https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html.
"""

from __future__ import annotations

from typing import Literal

Meaning = Literal["application", "note", "critical"]

APPLICATION = {
    13: "an exception in the program's kernel (such as an index out of bounds)",
    31: "the program used memory that is not its own",
    43: "the program's work was stopped after an error of its own",
    45: "what was left of an ended program was cleaned up",
    68: "an error of the video decoder",
    109: "the program did not let go of the device in time",
}

NOTES = {
    63: "a faulty row of its memory is replaced at the next reset",
    92: "many corrected memory errors",
    94: "a memory error that only the program which met it suffered from",
    154: "what the driver wants done has changed",
}
"""Nothing is wrong with what runs; where something must be done, the samples show it (errors, the driver's wish)."""

CRITICAL = {
    48: "an uncorrectable memory error",
    62: "its controller halted",
    64: "a row of its memory could not be replaced",
    74: "an error of NVLink",
    79: "it has fallen off the bus",
    95: "an uncontained memory error",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "memory errors that were not recovered from",
    143: "it could not be initialised",
}


def meaning(xid: int, harmless: frozenset[int] = frozenset()) -> Meaning:
    """harmless: what the site takes for application errors besides."""
    if xid in APPLICATION or xid in harmless:
        return "application"
    return "note" if xid in NOTES else "critical"


def words(xid: int) -> str:
    """`it has fallen off the bus (XID 79)`."""
    known = APPLICATION | NOTES | CRITICAL
    return f"{known.get(xid, 'an error of the device')} (XID {xid})"
