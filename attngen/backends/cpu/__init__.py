"""The embedded backend: forward and backward on any CPU."""
