"""The numbers of the model, each with where it is from. Seconds, bytes, TPCs (1 TPC = 2 SMs)."""

HOPPER_TPCS = 66
"""H100 and H200: 132 SMs. NVIDIA's data sheet."""

AMPERE_TPCS = 54
"""A100: 108 SMs. NVIDIA's data sheet."""

PCIE5_BANDWIDTH = 50e9
"""Bytes a second between pinned host memory and an H100 or H200, one direction, as commonly measured on PCIe 5 x16."""

ATOM = 500e-6
"""LithOS (SOSP'25, arXiv 2504.15465) relaunches long kernels in pieces of 250 to 500 µs; this is the longer end. It is
also what a kernel of a training step may take without anybody cutting it: the bound within which a borrower that
launches little ahead gives TPCs back."""

TIME_SLICE = 2e-3
"""Turn of one process where several share a device without MPS. Assumed: the default that NVIDIA's documents give for
up to 8 vGPUs; the driver's own is not documented."""

CONTEXT_SWITCH = 100e-6
"""Time between two such turns in which nobody computes. Assumed; 'some hundred microseconds' is what is usually said of
saving the registers and shared memory of a whole device."""

ALLOWED_SLOWDOWN = 0.04
"""LithOS gives up about 4 % of throughput for 26 % of capacity."""
