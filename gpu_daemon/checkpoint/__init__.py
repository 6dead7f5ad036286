"""Moving everything that a process has on its GPUs to host memory and back, by the driver (CUDA's checkpoint API)."""
