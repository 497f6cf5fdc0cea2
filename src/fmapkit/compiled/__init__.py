"""Passes of what `torch.compile` has compiled: graphs that return their maps."""

from fmapkit.compiled.entries import NOTHING_RAN, Compiled

__all__ = ["NOTHING_RAN", "Compiled"]
