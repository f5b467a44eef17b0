"""The tuner: searches schedules with Optuna, measures them in a worker process or models them, remembers the best.

    space     what may be chosen            search    the loop: suggest, refuse, measure, keep
    model     what is known beforehand      trials    Optuna's study
    measure   the worker and its protocol   bench     inside the worker: oracle check and timing
    stopwatch seconds of one run            tuner     `tune` and its report
    target_device   this machine's GPU or CPU by measuring, or a GPU by name

Importing this package loads neither Optuna nor SQLAlchemy; `trials` does when a search starts.
"""

from attngen.tuning.captures import make_captures
from attngen.tuning.tuner import Tuned, TuneReport, tune

__all__ = ["TuneReport", "Tuned", "make_captures", "tune"]
