"""What a person sees while tuning: best time, done, failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attngen.tuning.search import Progress

Watch = Callable[[Progress], None]


@contextmanager
def shown(title: str, show: bool) -> Iterator[Watch]:
    """A callback that draws a search's progress on stderr; with show=False it does nothing."""
    if not show:
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("best {task.fields[best]}  failed {task.fields[failed]}  pruned {task.fields[pruned]}"),
        TimeElapsedColumn(),
        *([TextColumn("[dim]{task.fields[now]}")] if console.width >= 140 else []),
        console=console,
    )
    with bar:
        task = bar.add_task(title, total=None, best="-", failed=0, pruned=0, now="starting")

        def watch(progress: Progress) -> None:
            best = "-" if progress.best is None else time_text(progress.best.outcome.seconds)
            bar.update(
                task,
                total=progress.trials,
                completed=min(progress.done, progress.trials),
                best=best,
                failed=progress.failed,
                pruned=progress.pruned,
                now=progress.now,
            )

        yield watch


def time_text(seconds: float) -> str:
    """ "1.23 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
