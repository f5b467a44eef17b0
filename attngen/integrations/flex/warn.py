"""What is said once."""

from __future__ import annotations

import warnings

from attngen.errors import AttngenWarning

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, unless this was said before."""
    if message not in _said:
        _said.add(message)
        warnings.warn(AttngenWarning(message), stacklevel=3)
