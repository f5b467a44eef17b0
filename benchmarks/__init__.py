"""Figures that anyone can reproduce: `python -m benchmarks --help`, and on a CPU `python -m benchmarks.cpu --help`."""
