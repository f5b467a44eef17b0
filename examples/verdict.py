"""How every example ends: one line that says whether its result was right, and the figures that it was about, timed alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

FLOAT32, GRADIENT, FLOAT16 = 1e-5, 1e-4, 5e-3  # what a result may be off by, relative to its norm


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference against the norm of what is wanted."""
    return ((got.detach().double() - want.detach()).norm() / want.detach().norm()).item()


def timed(run: Callable[[], Result], runs: int = 5) -> tuple[Result, float]:
    """The result, and the best of so many runs in seconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        out = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return out, min(times)


def here() -> str:
    """What the figures are of."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"


def verdict(claim: str, error: float, most: float, *figures: str) -> None:
    """Print it. Raises SystemExit(1) for an error above `most`, or one that is no number."""
    met = error <= most
    words = claim if met else f"FAILED, not: {claim}"
    print("; ".join([f"verdict: {words}, largest relative error {error:.1e} (at most {most:.0e})", *figures]))
    if not met:
        raise SystemExit(1)
