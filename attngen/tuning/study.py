"""How trials stand in an Optuna study, for people who open it in a dashboard too: a trial's params are the schedule, its value the
time in seconds, its attributes tell the rest of the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attngen.tuning.measure import Outcome
from attngen.tuning.space import Point, Space

PRUNED = "pruned"  # the status of a point that the model refused: not measured, and not counted
ABANDONED = "abandoned"  # of a trial whose tuner was killed or interrupted: as if it had not been tried


@dataclass(frozen=True)
class Tried:
    """A finished trial."""

    point: Point
    outcome: Outcome


def distributions(optuna: Any, space: Space) -> dict[str, Any]:
    return {name: optuna.distributions.CategoricalDistribution(values) for name, values in space.choices.items()}


def state_of(optuna: Any, outcome: Outcome) -> tuple[Any, list[float] | None]:
    """As Optuna says it: complete with a time, pruned by the model, or failed."""
    states = optuna.trial.TrialState
    if outcome.ok:
        return states.COMPLETE, [outcome.seconds]
    return (states.PRUNED if outcome.status == PRUNED else states.FAIL), None


def notes_of(outcome: Outcome) -> dict[str, Any]:
    """An outcome as attributes of a trial, whose value is the time."""
    notes: dict[str, Any] = {"status": outcome.status}
    if outcome.ok:
        return notes | {"spread": outcome.spread, "error": outcome.error}
    return notes | ({"error": outcome.error} if outcome.error else {}) | {"reason": outcome.reason}


def tried_of(trial: Any) -> Tried | None:
    """A finished trial; None for one that runs or was given up."""
    notes = trial.user_attrs
    if not trial.state.is_finished() or notes.get("status") in (None, ABANDONED):
        return None
    seconds = trial.value if trial.value is not None else float("inf")
    outcome = Outcome(
        notes["status"], seconds, notes.get("spread", 0.0), notes.get("error", 0.0), notes.get("reason", "")
    )
    return Tried(dict(trial.params), outcome)
