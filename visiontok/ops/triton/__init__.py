"""Fused kernels for GPUs. Imported only where they run; each has a plain torch reference of the same signature."""
