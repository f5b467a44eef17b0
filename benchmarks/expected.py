"""How long the suites take on a GPU at full size, so that one knows how often to run them: a model in round figures, mostly
of compiling. Nothing of it is measured.
"""

from __future__ import annotations

from collections.abc import Iterable

from attngen.tuning.race import LONGEST, WARM_UP
from benchmarks.case import FORWARD, Case, Sizes
from benchmarks.cases import CASES, cases_of
from benchmarks.peers import VARIANTS

BUDGET = 450.0  # seconds of a run
TIMING = 1.0  # seconds of a case's race behind its warm-up; its inputs, reference and first lap take about twice that
# Seconds to have a peer ready, forward and with a backward: kernels to compile, or a list of them to try.
ATTNGEN = (3.0, 8.0)
SYSTEM = (15.0, 35.0)  # several pieces, compiled for the check in float32 too
READY = {"flex": (10.0, 20.0), "flex-max-autotune": (45.0, 120.0), "flashinfer": (10.0, 10.0)}
READY["cudnn-flex"] = (5.0, 10.0)  # on average: a kernel serves all sizes of its head dim
CALLED = (0.2, 0.2)  # what is compiled already
PAIRS = 4e9  # pairs of a float64 reference a second
PROCESSES = {"attngen": 60.0, "flex": 40.0}  # seconds of `first_call`: three new processes, or one


def seconds(case: Case, timing: float = TIMING) -> float:
    """Of one case."""
    total = 3 * timing + min(LONGEST, WARM_UP * timing)  # a warm-up at its longest
    if case.suite == "first_call":
        return total + sum(PROCESSES.get(peer, 0.0) for peer in case.peers)
    backward = case.direction != FORWARD
    systems = {system.name for system in case.systems}
    for peer in case.peers:
        ours = peer == "attngen" or peer in VARIANTS
        total += (SYSTEM if peer in systems else ATTNGEN if ours else READY.get(peer, CALLED))[backward]
    if backward:
        total += 4 * (case.heads_q // case.heads_kv) * case.n_q * case.n_k / PAIRS
    return total


def runs(cases: Iterable[Case], budget: float = BUDGET, timing: float = TIMING) -> int:
    """How many runs it takes until nothing is left, by the rule of `suite.run`."""
    count, spent = 0, budget
    for case in cases:
        took = seconds(case, timing)
        if spent + took > budget:
            count, spent = count + 1, 0.0
        spent += took
    return count


def table(budget: float = BUDGET, timing: float = TIMING) -> dict[str, int]:
    """Runs of every suite on a GPU at full size."""
    sizes = Sizes(small=False, cuda=True)
    return {suite: runs(cases_of(suite, sizes), budget, timing) for suite in CASES}


def text() -> str:
    """The table in words."""
    counted = ", ".join(f"{suite} {count}" for suite, count in table().items())
    return (
        f"Runs of {BUDGET:.0f} s until nothing is left, on a GPU at full size, modelled and not measured (most of it is\n"
        f"compiling): {counted}."
    )
