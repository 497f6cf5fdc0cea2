"""Passes of what `torch.compile` has compiled: graphs that return their maps."""
