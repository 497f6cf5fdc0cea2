"""Programs to run: `python -m examples.demo`."""
