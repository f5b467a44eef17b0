"""How hard to search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attngen.errors import InputError


@dataclass(frozen=True)
class Effort:
    """trials: for each shape and direction, beside what the model refuses; patience: seconds of each race."""

    trials: int
    patience: float


EFFORTS: Mapping[str, Effort] = {
    "quick": Effort(3, 0.1),  # the model's choice, and its two best guesses
    "standard": Effort(40, 0.5),
    "full": Effort(150, 1.0),
}


def effort_named(name: str, trials: int | None, patience: float | None) -> Effort:
    """The effort of a name, with what is given in its place. InputError."""
    if name not in EFFORTS:
        raise InputError("effort", f"one of {', '.join(EFFORTS)}", repr(name), "or give trials=")
    if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
        raise InputError("trials", "a positive int", repr(trials))
    usual = EFFORTS[name]
    return Effort(usual.trials if trials is None else trials, usual.patience if patience is None else patience)
