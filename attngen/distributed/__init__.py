"""Attention over several processes, and blocks of a transformer."""
