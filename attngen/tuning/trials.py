"""The trials of a search in an Optuna study: resumable, shared by a fleet. Here and in `fleet` Optuna is imported.

Files use Optuna's journal (many processes on its SQLite storage lock each other out); anything with `://` is an Optuna
storage URL, e.g. postgresql:// for a fleet: the same command on every machine.

The study holds what was tried, and nothing else. Suggestions come from a study of this process's own (`Guide`), which is told
what became of every trial: those that are illegal or not new are dropped there, and nobody else sees them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attngen.errors import AttngenWarning, StoreError
from attngen.store import engine_url, is_url, shown
from attngen.tuning.fleet import ENDED, Claims, Presence
from attngen.tuning.guide import Guide
from attngen.tuning.measure import Outcome
from attngen.tuning.space import Point, Space
from attngen.tuning.study import ABANDONED, Tried, distributions, notes_of, state_of, tried_of

POLL = 0.5  # seconds between two looks at what other tuners do
OPENINGS = 5  # attempts at a database in which several tuners may be making Optuna's tables at once


@dataclass(frozen=True)
class Asked:
    """A point that is being tried; `trial` is the storage's number for it."""

    point: Point
    trial: int


class Trials:
    """One study: what was tried, what other tuners are trying, and the sampler's suggestions. As a context manager it tells the
    other tuners of the study that this one is there.

    storage: a file, an Optuna URL, or None for memory; about: what the study is about, its attributes. Raises StoreError if
    the storage cannot be used.
    """

    def __init__(self, storage: str | Path | None, name: str, seed: int = 0, about: Mapping[str, Any] | None = None):
        import optuna

        self._optuna, self.name, self._race = optuna, name, f"{name}, final race "
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._open(storage)
        except Exception as problem:
            if storage is None or is_url(storage):
                said = str(problem) if isinstance(problem, StoreError) else f"{type(problem).__name__}: {problem}"
                raise StoreError(f"storage {shown(storage)}: {said}") from problem
            _set_aside(Path(storage), problem)
            self._open(storage)
        for key, value in (about or {}).items():
            if self._study.user_attrs.get(key) != value:
                self._study.set_user_attr(key, value)
        self._presence = Presence(self._study)
        self._claims = Claims(self._storage, self._presence)
        self._alone = storage is None
        self._history: dict[int, Tried] = {}
        self.asking = 0.0  # seconds spent on suggestions so far
        self._races_before = sum(name.startswith(self._race) for name in optuna.get_all_study_names(self._storage))
        # A fleet's tuners must not draw alike; a search that starts by itself can be repeated.
        self._guide = Guide(optuna, None if is_url(storage) else seed)

    def __enter__(self) -> Trials:
        if not self._alone:
            self._presence.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._alone:
            self._presence.close()

    def _open(self, storage: str | Path | None) -> None:
        self._storage = self._backend(storage)
        self._study = self._optuna.create_study(
            study_name=self.name, storage=self._storage, load_if_exists=True, direction="minimize"
        )
        self._id = self._storage.get_study_id_from_name(self.name)
        self._study.get_trials(deepcopy=False)

    def _backend(self, storage: str | Path | None) -> Any:
        storages = self._optuna.storages
        if storage is None:
            return storages.InMemoryStorage()
        if not is_url(storage):
            path = Path(storage)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._mend(path)
            return storages.JournalStorage(storages.journal.JournalFileBackend(str(path)))
        url = engine_url(str(storage)).render_as_string(hide_password=False)
        from sqlalchemy.exc import IntegrityError, ProgrammingError

        for attempt in range(1, OPENINGS):
            try:
                return storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
            except (IntegrityError, ProgrammingError):  # another tuner is making the tables
                time.sleep(POLL * attempt)
        return storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})

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

    # What was tried --------------------------------------------------------------------------------------------------

    def history(self) -> list[Tried]:
        """Every finished trial, of all tuners, in order; pruned ones included."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.number not in self._history and (tried := tried_of(trial)) is not None:
                self._history[trial.number] = tried
        return [self._history[number] for number in sorted(self._history)]

    def others(self) -> list[Point]:
        """What other tuners are trying now. Trials of those that are gone are given up."""
        points = []
        for trial in self._running():
            name = trial.user_attrs.get("tuner", "")
            if name == self._presence.name:
                continue
            if self._presence.gone(name):
                self._finish(trial._trial_id, Outcome(ABANDONED, reason="its tuner is gone"))
            else:
                points.append(dict(trial.params))
        return points

    def _running(self) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.RUNNING,)))

    def ask(self, space: Space, wanted: Point | None = None) -> Asked:
        """Begin the trial of a point of the space, `wanted` or the sampler's."""
        point = self.suggest(space) if wanted is None else wanted
        trial = self._optuna.trial.create_trial(
            state=self._optuna.trial.TrialState.RUNNING,
            params=point,
            distributions=distributions(self._optuna, space),
            user_attrs={"tuner": self._presence.name},
        )
        return Asked(point, self._storage.create_new_trial(self._id, template_trial=trial))

    def tell(self, asked: Asked, outcome: Outcome) -> None:
        """Keep an outcome."""
        self._finish(asked.trial, outcome)

    def forget(self, asked: Asked) -> None:
        """The trial was interrupted: it counts as not tried."""
        self._finish(asked.trial, Outcome(ABANDONED, reason="interrupted"))

    def _finish(self, trial: int, outcome: Outcome) -> None:
        state, values = state_of(self._optuna, outcome)
        try:
            for name, note in notes_of(outcome).items():
                self._storage.set_trial_user_attr(trial, name, note)
            self._storage.set_trial_state_values(trial, state, values)
        except self._optuna.exceptions.UpdateFinishedTrialError:
            pass  # this tuner was taken for gone, or another one has noticed as well that one is

    # Suggestions -----------------------------------------------------------------------------------------------------

    def suggest(self, space: Space) -> Point:
        """The sampler's next suggestion. It may be illegal or tried before: the search decides."""
        start = time.perf_counter()
        point = self._guide.suggest(space, self._study.get_trials(deepcopy=False))
        self.asking += time.perf_counter() - start
        return point

    def tighten(self, space: Space, best: Sequence[Tried]) -> None:
        """Let a fresh sampler that knows only the best trials suggest from the smaller space (arXiv 2309.04510)."""
        known = [trial.number for trial in self._study.get_trials(deepcopy=False)]
        self._guide = self._guide.afresh(space, best, known)

    # The final race --------------------------------------------------------------------------------------------------

    def share_race(
        self,
        finalists: Sequence[Point],
        space: Space,
        run: Callable[[], Sequence[Tried]],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> tuple[Tried, ...]:
        """The outcomes of a final race that has all the finalists: another tuner's, or this one's own by `run`.

        Each race is a study of its own beside the trials. Whoever creates it runs it, and the others wait; if its tuner is gone,
        the next who creates one runs that. A race of an earlier call counts too, unless it was noisy.
        """
        number = 0
        while True:
            number += 1
            race, own = self._claims.claim(f"{self._race}{number}")
            if own:
                return self._run_race(race, space, run)
            while not self._claims.ended(race):
                with waiting():
                    time.sleep(POLL)
            outcomes = [tried for tried in map(tried_of, race.get_trials(deepcopy=False)) if tried is not None]
            best = next((tried.outcome for tried in outcomes if tried.outcome.ok), None)
            fit = best is not None and not (best.noisy and number <= self._races_before)
            if fit and all(any(tried.point == point for tried in outcomes) for point in finalists):
                return tuple(outcomes)

    def _run_race(self, race: Any, space: Space, run: Callable[[], Sequence[Tried]]) -> tuple[Tried, ...]:
        ended = "interrupted"
        try:
            outcomes = tuple(run())
            for tried in outcomes:
                state, values = state_of(self._optuna, tried.outcome)
                race.add_trial(
                    self._optuna.trial.create_trial(
                        state=state,
                        values=values,
                        params=tried.point,
                        distributions=distributions(self._optuna, space),
                        user_attrs=notes_of(tried.outcome),
                    )
                )
            ended = "run"
            return outcomes
        finally:
            race.set_user_attr(ENDED, ended)


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
