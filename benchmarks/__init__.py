"""Figures that anyone can reproduce: `python -m benchmarks.cpu --help`."""
