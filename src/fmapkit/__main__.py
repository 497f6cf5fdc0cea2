"""`python -m fmapkit`: the command line; see `fmapkit.cli`."""

import sys

from fmapkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
