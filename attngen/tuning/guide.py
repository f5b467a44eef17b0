"""The sampler: suggests points to a search, on a study in memory that is told what became of the shared one's trials."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from attngen.tuning.space import Point, Space
from attngen.tuning.study import Tried, distributions, tried_of


class Guide:
    """Optuna's sampler. What it suggests and nobody tries is known to it alone."""

    def __init__(self, optuna: Any, seed: int | None):
        self._optuna, self._seed = optuna, seed
        self._told: dict[
            int, int | None
        ] = {}  # a trial of the shared study -> here; None once it needs no more telling
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # multivariate: tile sizes matter together; constant_liar: a fleet's tuners do not all try the same.
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=10)
        self._study = optuna.create_study(sampler=sampler)

    def suggest(self, space: Space, trials: Iterable[Any]) -> Point:
        """A point of the space, from what is known of its trials."""
        for trial in trials:
            self._tell(space, trial)
        handle = self._study.ask(distributions(self._optuna, space))
        self._study.tell(handle, state=self._optuna.trial.TrialState.FAIL)  # a question is no trial
        return dict(handle.params)

    def afresh(self, space: Space, best: Iterable[Tried], known: Iterable[int]) -> Guide:
        """Another one, which knows of the best and of no other trial so far."""
        guide = Guide(self._optuna, self._seed)
        guide._told.update(dict.fromkeys(known))
        for tried in best:
            if space.holds(tried.point):
                guide._add(space, tried.point, value=tried.outcome.seconds)
        return guide

    def _tell(self, space: Space, trial: Any) -> None:
        states, number = self._optuna.trial.TrialState, trial.number
        if number in self._told and self._told[number] is None:
            return
        if number not in self._told:
            holds = space.holds(dict(trial.params))
            self._told[number] = self._add(space, dict(trial.params), state=states.RUNNING) if holds else None
        here = self._told[number]
        if here is None or not trial.state.is_finished():
            return
        tried, self._told[number] = tried_of(trial), None
        if tried is None:
            self._study.tell(here, state=states.FAIL)
        elif tried.outcome.ok:
            self._study.tell(here, tried.outcome.seconds)
        else:  # what failed or was refused counts as bad, without a value
            self._study.tell(here, state=states.PRUNED)

    def _add(self, space: Space, point: Point, **result: Any) -> int:
        known = distributions(self._optuna, space)
        self._study.add_trial(self._optuna.trial.create_trial(params=point, distributions=known, **result))
        return len(self._study.get_trials(deepcopy=False)) - 1
