"""`attngen tune`."""

from __future__ import annotations

from typing import Annotated

import typer

from attngen.cli.coverage import print_coverage
from attngen.cli.options import Database, Set, console
from attngen.cli.workloads import Batch, Context, DtypeOr, Model, Padded, Shapes, Source, Training, gathered
from attngen.tuning.coverage import coverage
from attngen.tuning.effort import EFFORTS
from attngen.tuning.target_device import find_target_device
from attngen.tuning.tuner import tune_all

EXAMPLE = (
    "Example: [b]attngen tune 'i >= j and i - j < 512' --shape 'B1 H8 N4096 D64' --effort quick[/b]; "
    "[b]attngen tune --model config.json --batch 1 --batch 8 --context 8192 --target H100[/b]; "
    "[b]attngen tune attentions.toml[/b]"
)
_TRIALS = ", ".join(f"{name} {effort.trials}" for name, effort in EFFORTS.items())


def tune(
    spec: Source = None,
    model: Model = None,
    batch: Batch = None,
    context: Context = None,
    training: Training = False,
    padded: Padded = False,
    shape: Shapes = None,
    dtype: DtypeOr = None,
    set_: Set = None,
    effort: Annotated[str, typer.Option(help=f"How many candidates to try for each shape: {_TRIALS}.")] = "standard",
    trials: Annotated[int | None, typer.Option(help="So many candidates, whatever the effort.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Model this GPU (H200, sm_90, ...) instead of measuring here.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Stop after this many seconds.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="The trials: a file or an Optuna URL. Default: the URL of --db, if it is one, else the cache folder."
        ),
    ] = None,
    db: Database = None,
) -> None:
    """Search for the fastest schedules and remember them: of a spec, of a list of them, or of all attention in a model. Ctrl-C keeps
    what was learned, and the same command goes on from there.
    """
    calls = gathered(spec, model, batch, context, training, padded, shape, dtype, set_)
    report = tune_all(calls, effort=effort, trials=trials, target=target, timeout=timeout, storage=storage, db=db)
    console.print(report.brief if len(calls) > 1 else str(report), markup=False)
    if len(calls) > 1:
        print_coverage(coverage(calls, [find_target_device(target, None)], db=db))
