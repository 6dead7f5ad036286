"""Holding this process to its grant: the CUDA driver's green contexts, and torch's stream and memory limit.

Needs neither torch nor a driver to be imported."""
