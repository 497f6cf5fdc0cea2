"""What torch keeps to itself, behind names of our own: memory, modes, calls, wrappers, fused paths."""
