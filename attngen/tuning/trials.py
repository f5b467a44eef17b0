"""The trials of a search in an Optuna study: resumable, shared by a fleet. The only module that imports Optuna.

Files use Optuna's journal (many processes on its SQLite storage lock each other out); anything with `://` is an Optuna
storage URL, e.g. postgresql:// for a fleet: the same command on every machine.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from attngen.errors import AttngenWarning, StoreError
from attngen.tuning.measure import Outcome
from attngen.tuning.space import Point, Space

PRUNED = "pruned"  # the status of a point that the model refused: not measured, and not counted
STALE = timedelta(hours=1)  # a trial still running after this long was left behind by a process that died


@dataclass(frozen=True)
class Tried:
    """A finished trial."""

    point: Point
    outcome: Outcome


@dataclass
class Asked:
    """A point to try; `handle` is Optuna's."""

    point: Point
    handle: Any


class Trials:
    """One study: what was tried, and the sampler's next suggestion.

    storage: a file, an Optuna URL, or None for memory. Raises StoreError if the storage cannot be used.
    """

    def __init__(self, storage: str | Path | None, name: str, seed: int = 0):
        import optuna

        self._optuna, self.name, self._seed = optuna, name, seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._shared = storage is not None and "://" in str(storage)
        try:
            self._study = self._open(storage)
        except Exception as problem:
            if storage is None or self._shared:
                raise StoreError(f"storage {storage}: {type(problem).__name__}: {problem}") from problem
            self._study = self._open(_set_aside(Path(storage), problem))
        self._guide = self._study  # who suggests: the study itself, until the ranges are tightened
        self._history: dict[int, Tried] = {}
        self._drop_stale()
        self.asking = 0.0  # seconds spent on suggestions so far

    def _open(self, storage: str | Path | None) -> Any:
        optuna = self._optuna
        backend: Any = None if storage is None else str(storage)
        if backend is not None and "://" not in backend:
            Path(backend).parent.mkdir(parents=True, exist_ok=True)
            self._mend(Path(backend))
            file = optuna.storages.journal.JournalFileBackend(backend)
            backend = optuna.storages.JournalStorage(file)
        return optuna.create_study(
            study_name=self.name, storage=backend, sampler=self._sampler(), load_if_exists=True, direction="minimize"
        )

    def _mend(self, path: Path) -> None:
        """Cut off a last line that a killed process did not finish; the next line would be glued to it."""
        from optuna.storages.journal import JournalFileSymlinkLock

        lock = JournalFileSymlinkLock(str(path))
        if not path.is_file() or not lock.acquire():
            return
        try:
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                with path.open("r+b") as file:
                    file.truncate(data.rfind(b"\n") + 1)
        finally:
            lock.release()

    def _sampler(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            # multivariate: tile sizes matter together; constant_liar: a fleet's workers do not all try the same.
            return self._optuna.samplers.TPESampler(
                seed=None if self._shared else self._seed,  # a fleet's workers must not draw alike
                multivariate=True,
                constant_liar=True,
                n_startup_trials=10,
            )

    def history(self) -> list[Tried]:
        """Every finished trial, of all processes, in order; pruned ones included."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.number not in self._history and trial.state.is_finished() and "outcome" in trial.user_attrs:
                notes = trial.user_attrs
                self._history[trial.number] = Tried(dict(notes["point"]), _outcome(notes["outcome"]))
        return [self._history[number] for number in sorted(self._history)]

    def ask(self, space: Space, wanted: Point | None = None) -> Asked:
        """The sampler's next suggestion, or `wanted`. It may be illegal or tried before: the search decides."""
        start = time.perf_counter()
        if wanted is not None:
            self._guide.enqueue_trial(wanted)
        handle = self._guide.ask(self._distributions(space))
        self.asking += time.perf_counter() - start
        return Asked(dict(handle.params), handle)

    def tell(self, asked: Asked, outcome: Outcome) -> None:
        """Keep an outcome. What failed or was refused counts as bad for the sampler, without a value."""
        states = self._optuna.trial.TrialState
        state = states.COMPLETE if outcome.ok else states.PRUNED
        values = [outcome.seconds] if outcome.ok else None
        notes = {"point": asked.point, "outcome": _plain(outcome)}
        if self._guide is self._study:
            for name, note in notes.items():
                asked.handle.set_user_attr(name, note)
            self._study.tell(asked.handle, values, state=state)
            return
        self._guide.tell(asked.handle, values, state=state)
        self._study.add_trial(self._optuna.trial.create_trial(state=state, values=values, user_attrs=notes))

    def forget(self, asked: Asked) -> None:
        """The point was not tried: the sampler ignores it."""
        self._guide.tell(asked.handle, state=self._optuna.trial.TrialState.FAIL)

    def tighten(self, space: Space, best: Sequence[Tried]) -> None:
        """Let a fresh sampler that knows only the best trials suggest from the smaller space (arXiv 2309.04510)."""
        self._guide = self._optuna.create_study(sampler=self._sampler())
        distributions = self._distributions(space)
        for tried in best:
            if space.holds(tried.point):
                self._guide.add_trial(
                    self._optuna.trial.create_trial(
                        params=tried.point, distributions=distributions, value=tried.outcome.seconds
                    )
                )

    def _distributions(self, space: Space) -> dict[str, Any]:
        return {
            name: self._optuna.distributions.CategoricalDistribution(values) for name, values in space.choices.items()
        }

    def _drop_stale(self) -> None:
        states = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            if trial.datetime_start is None or datetime.now() - trial.datetime_start > STALE:
                self._study.tell(trial.number, state=states.FAIL, skip_if_finished=True)


def _set_aside(path: Path, problem: Exception) -> Path:
    """A journal that cannot be read is renamed, never deleted, and tuning starts a new one."""
    if not path.is_file():
        raise StoreError(f"storage {path}: {type(problem).__name__}: {problem}") from problem
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    path.rename(aside)
    warnings.warn(
        AttngenWarning(f"the trials in {path} cannot be read ({problem}); kept as {aside.name}, starting anew"),
        stacklevel=3,
    )
    return path


def _plain(outcome: Outcome) -> dict[str, Any]:
    """For JSON, which has no infinity."""
    return {name: value for name, value in asdict(outcome).items() if value != float("inf")}


def _outcome(saved: Any) -> Outcome:
    return Outcome(**json.loads(json.dumps(saved)))
