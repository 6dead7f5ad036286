"""Looking after what processes really do on this host's GPUs, as NVML tells (docs/slices.md, "The watchdog")."""
