"""ATTNGEN_DEBUG=1..5: what the stages decided, on stderr. Each level includes the lower ones.

1 choices   2 timings   3 schedules and facts   4 generated source   5 the plan, the canonical spec, a kernel's statements after each pass
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def level() -> int:
    """The current level, 0 if unset or not a number."""
    text = os.environ.get("ATTNGEN_DEBUG", "")
    return int(text) if text.isdigit() else 0


def say(at: int, what: str, text: object) -> None:
    """Print `text` under the heading `what` if the level is at least `at`."""
    if level() >= at:
        print(f"[attngen {what}] {text}", file=sys.stderr)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say how long the block took, from level 2."""
    start = time.perf_counter()
    yield
    say(2, "time", f"{what}: {(time.perf_counter() - start) * 1e3:.2f} ms")
