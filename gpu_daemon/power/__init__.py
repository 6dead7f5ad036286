"""Locked clocks: how far a device's may go down while its cells lose no more than was allowed (docs/power.md)."""
