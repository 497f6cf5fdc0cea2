"""The command line: `fmapkit show` and `fmapkit extract`; built on the public interface."""

from fmapkit.cli.commands import main, parser

__all__ = ["main", "parser"]
