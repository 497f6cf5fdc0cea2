"""What torch keeps to itself, behind names of ours: memory, modes, calls, wrappers, fused paths."""
