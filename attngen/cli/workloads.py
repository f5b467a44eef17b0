"""The calls that a command is about: of one spec, of a list in a TOML file, or of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from attngen.cli.options import console, given_captures, read_dtype
from attngen.errors import InputError
from attngen.integrations.config import attentions, read_config, unread_parts, workloads
from attngen.language.files import read_spec
from attngen.store import Shape, Workload
from attngen.store.workload import is_list, read_list

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="SPEC|FILE.toml",
        help="Text such as 'i >= j', file.py:NAME, a TOML file of one spec, or one that lists specs and shapes.",
    ),
]
Model = Annotated[
    str | None, typer.Option(help="A transformers config.json, or its folder: every different attention of the model.")
]
Batch = Annotated[list[int] | None, typer.Option(help="With --model: a batch size; give it several times. Default: 1.")]
Context = Annotated[
    list[int] | None, typer.Option(help="With --model: tokens of a sequence; give it several times. Default: 4096.")
]
Training = Annotated[bool, typer.Option("--training", help="With --model: the backward of whole contexts too.")]
Padded = Annotated[bool, typer.Option("--padded", help="With --model: for batches with padding too.")]
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", help="Sizes; give it several times. Default: 'B1 H8 N4096 D64'.")
]
DtypeOr = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16. Default: the model's or the file's, else bfloat16 for a GPU, float32 for the CPU."
    ),
]


def gathered(
    source: str | None,
    model: str | None,
    batch: Sequence[int] | None,
    context: Sequence[int] | None,
    training: bool,
    padded: bool,
    shape: Sequence[str] | None,
    dtype: str | None,
    set_: list[str] | None,
    quiet: bool = False,
) -> list[Workload]:
    """The calls. quiet: what a model has is not printed. InputError, SpecError, StoreError."""
    element = "" if dtype is None else str(read_dtype(dtype)).removeprefix("torch.")
    if (source is None) == (model is None):
        raise InputError("SPEC", "a spec, a TOML file, or --model", "both" if source else "nothing")
    if model is not None:
        _refuse("--model", {"--shape": shape, "--set": set_}, "its sizes are those of --batch and --context")
        return _of_model(model, batch or [1], context or [4096], element, training, padded, quiet)
    _refuse(
        "SPEC",
        {"--batch": batch, "--context": context, "--training": training, "--padded": padded},
        "they go with --model",
    )
    assert source is not None
    if is_list(source):
        _refuse("FILE.toml", {"--shape": shape, "--set": set_, "--dtype": dtype}, "it says them itself")
        return read_list(source)
    spec = read_spec(source)
    given = given_captures(spec, set_)
    return [Workload("", spec, Shape.of(text), element, given) for text in shape or ["B1 H8 N4096 D64"]]


def _of_model(
    path: str, batches: Sequence[int], contexts: Sequence[int], dtype: str, training: bool, padded: bool, quiet: bool
) -> list[Workload]:
    for name, sizes in (("--batch", batches), ("--context", contexts)):
        for size in sizes:
            if size < 1:
                raise InputError(name, "a positive int", size)
    config = read_config(path)
    found = workloads(config, batches, contexts, dtype=dtype, training=training, padded=padded)
    for attention in [] if quiet else attentions(config):
        console.print(f"[dim]{escape(str(attention))}[/dim]")
    if not quiet and (left := unread_parts(config)):
        console.print(f"[dim]not read: {', '.join(left)} (give it as a file of its own)[/dim]")
    return found


def _refuse(what: str, others: dict[str, Any], why: str) -> None:
    for name, value in others.items():
        if value:
            raise InputError(name, f"nothing next to {what}", value, why)
