"""How slices of this host's devices are held: what the host offers, looked at again and again (docs/slices.md)."""
