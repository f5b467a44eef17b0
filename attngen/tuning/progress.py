"""What a person sees while tuning: trials done, failed and pruned, the best so far and what is kept, and the time it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attngen.store import time_text
from attngen.tuning.search import Progress

Watch = Callable[[Progress], None]


@contextmanager
def shown(title: str, show: bool) -> Iterator[Watch]:
    """A callback that draws a search's progress on stderr; with show=False it does nothing."""
    if not show:
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TextColumn("{task.fields[clock]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        *([TextColumn("[dim]{task.fields[now]}")] if console.width >= 140 else []),
        console=console,
        speed_estimate_period=600.0,  # a trial may take a minute
    )
    with bar:
        task = bar.add_task(title, total=None, told="-", clock="left", now="starting")
        begun = False

        def watch(progress: Progress) -> None:
            nonlocal begun
            done, ended = min(progress.done, progress.trials), progress.kept is not None
            if not begun:  # what an earlier call did says nothing about the time that this one takes
                bar.reset(task, total=progress.trials, completed=done)
                begun = True
            bar.update(
                task,
                total=done if ended else progress.trials,
                completed=done,
                told=_told(progress),
                clock="took" if ended else "left",
                now=progress.now,
            )

        yield watch


def _told(progress: Progress) -> str:
    """The best time, and which one it is: of the races so far, or of the final one, as it is kept. Then what did not run."""
    best, word = (progress.kept, "kept") if progress.kept is not None else (progress.best, "so far")
    counts = {"failed": progress.failed, "pruned": progress.pruned}  # by the model: they are no trials
    time = "-" if best is None else f"{word} {time_text(best.outcome.seconds)}"
    return "  ".join([time, *(f"{name} {count}" for name, count in counts.items() if count)])
