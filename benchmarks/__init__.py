"""What capture costs, and whether it is right: `python -m benchmarks`."""
