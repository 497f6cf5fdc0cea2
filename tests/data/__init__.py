"""Processes that tests of `fmapkit.data` start, and kill."""
