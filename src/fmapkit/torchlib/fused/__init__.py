"""torch's fused inference paths, and what runs inside of their kernels."""
