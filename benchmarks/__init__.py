"""What capture costs: `python -m benchmarks overhead`."""
