"""What a person sees while tuning: trials done, failed and pruned, the best so far and what is kept, and the time it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attngen.store import time_text
from attngen.tuning.search import Progress

Watch = Callable[[Progress], None]
WIDTH = 38  # of a title; the rest of a line of 80 columns is numbers


class Bars:
    """A bar for the search under way and, of several searches, one for all of them. Here: nothing is shown."""

    @contextmanager
    def search(self, title: str) -> Iterator[Watch]:
        """A callback that draws a search's progress."""
        yield lambda progress: None

    def skipped(self, title: str, why: str) -> None:
        """A search that there is no need for."""


class ShownBars(Bars):
    """On stderr. searches: how many there will be; trials: of each. What an earlier call did says nothing about the time that this
    one takes, so it is left out of the bar over all searches.
    """

    def __init__(self, bar: Any, searches: int, trials: int):
        self.bar, self.searches, self.trials = bar, searches, trials
        self.expected = searches * trials  # trials, done ones included
        self.done = self.over = 0  # trials, searches
        self.all = None
        if searches > 1:
            self.all = bar.add_task("all", total=self.expected, told="", clock="left", now="")

    @contextmanager
    def search(self, title: str) -> Iterator[Watch]:
        watch = _Drawn(self.bar, _short(title), self)
        yield watch
        self._count(watch.made)
        if self.all is not None:  # of many searches only the one under way has a bar
            self.bar.remove_task(watch.task)
            self._say(f"{title}: {watch.told}")

    def skipped(self, title: str, why: str) -> None:
        self._say(f"{title}: {why}")
        self._count(0)

    def draw(self, made: int) -> None:
        """made: trials of the search under way."""
        if self.all is not None:
            done, clock = self.done + made, "took" if self.over == self.searches else "left"
            told = f"{self.over}/{self.searches} searches"
            self.bar.update(self.all, total=self.expected, completed=done, told=told, clock=clock)

    def _count(self, made: int) -> None:
        """A search is over: it made so many trials, and may have needed fewer than it was to make."""
        self.expected -= self.trials - made
        self.done, self.over = self.done + made, self.over + 1
        self.draw(0)

    def _say(self, line: str) -> None:
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Drawn:
    """The watch of one search."""

    def __init__(self, bar: Any, title: str, bars: ShownBars):
        self.bar, self.bars = bar, bars
        self.task = bar.add_task(title, total=None, told="-", clock="left", now="starting")
        self.resumed: int | None = None
        self.made, self.told = 0, ""

    def __call__(self, progress: Progress) -> None:
        done, ended = min(progress.done, progress.trials), progress.kept is not None
        if self.resumed is None:
            self.resumed = done
            self.bar.reset(self.task, total=progress.trials, completed=done)
        self.made = done - self.resumed
        self.told = _told(progress)
        total, clock = done if ended else progress.trials, "took" if ended else "left"
        self.bar.update(self.task, total=total, completed=done, told=self.told, clock=clock, now=progress.now)
        self.bars.draw(self.made)


@contextmanager
def shown(searches: int, trials: int, show: bool = True) -> Iterator[Bars]:
    """Bars for so many searches of so many trials each; with show=False they draw nothing."""
    if not show:
        yield Bars()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20 if console.width >= 100 else 8),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TextColumn("{task.fields[clock]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        *([TextColumn("[dim]{task.fields[now]}")] if console.width >= 140 else []),
        console=console,
        speed_estimate_period=600.0,  # a trial may take a minute
    )
    with bar:
        yield ShownBars(bar, searches, trials)


def _short(title: str) -> str:
    return title if len(title) <= WIDTH else title[: WIDTH - 1] + "…"


def _told(progress: Progress) -> str:
    """The best time, and which one it is: of the races so far, or of the final one, as it is kept. Then what did not run."""
    best, word = (progress.kept, "kept") if progress.kept is not None else (progress.best, "so far")
    counts = {"failed": progress.failed, "pruned": progress.pruned}  # by the model: they are no trials
    time = "-" if best is None else f"{word} {time_text(best.outcome.seconds)}"
    return "  ".join([time, *(f"{name} {count}" for name, count in counts.items() if count)])
