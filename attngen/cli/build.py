"""`attngen build`: kernels compiled ahead, into a folder that runs without the compiler."""

from __future__ import annotations

import re
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from attngen.cli.options import Database, Dtype, console, read_dtype
from attngen.cli.pack import summarise
from attngen.errors import InputError
from attngen.integrations.config import read_config, workloads
from attngen.language.files import read_spec
from attngen.packs.build import save_workloads
from attngen.packs.format import read
from attngen.packs.hub import PACK, VARIANT, save_repository
from attngen.store import Shape as Sizes
from attngen.store.workload import DIRECTIONS, Workload

EXAMPLE = "Example: [b]attngen build 'i >= j' --target H100 --shape 'B1 Hq32 Hkv8 N4096 D128' --out pack/[/b]"


class Format(StrEnum):
    """What the folder is."""

    PACK = "pack"
    HF_KERNELS = "hf-kernels"


def build(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SPEC...", help="Text such as 'i >= j', a TOML file, or file.py:NAME; NAME:=SPEC gives it a name."
        ),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A GPU (H100) or an architecture (sm_90); give it several times.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Sizes, as 'B1 Hq32 Hkv8 N4096 D128'; give it several times.")
    ] = None,
    dtype: Dtype = "bfloat16",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("pack"),
    format: Annotated[
        Format, typer.Option(help="A pack for ag.load, or a repository for Hugging Face's kernels library.")
    ] = Format.PACK,
    model: Annotated[
        Path | None, typer.Option(help="A transformers config.json: every attention of the model, prefill and decode.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="With --model: a batch; give it several times.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="With --model: a length; give it several times.")] = None,
    backward: Annotated[bool, typer.Option(help="Kernels of gradients too.")] = True,
    offset_tensors: Annotated[bool, typer.Option(help="Also for calls whose q_offset is a tensor.")] = False,
    search: Annotated[
        float | None,
        typer.Option(
            help="Seconds to find tiles by compiling for each attention without a record or a tile that ships; 0: safe tiles. "
            "Default: ATTNGEN_SEARCH_SECONDS, or 2."
        ),
    ] = None,
    db: Database = None,
) -> None:
    """Build kernels ahead, for GPUs that need not be here: a folder that ag.load runs without the compiler."""
    if not target:
        raise InputError("--target", "a GPU or an architecture", "nothing", "e.g. --target H100")
    calls = _of_specs(specs or [], shape or [], dtype, backward)
    if model is not None:
        calls += _of_model(model, batch or [1], context or [4096], backward)
    if not calls:
        raise InputError("SPEC", "a spec, or --model config.json", "neither", "see attngen build --help")
    how: dict[str, Any] = {"targets": target, "offset_tensors": offset_tensors, "search": search, "db": db}
    with console.status(f"compiling for {', '.join(target)}"):
        if format is Format.HF_KERNELS:
            pack = read(save_repository(calls, out, **how) / VARIANT / PACK)
        else:
            pack = read(save_workloads(calls, out, **how))
    console.print(summarise(pack), markup=False)
    _say_how(out, list(pack.manifest["specs"]), format)


def _of_specs(specs: list[str], shapes: list[str], dtype: str, backward: bool) -> list[Workload]:
    if specs and not shapes:
        raise InputError("--shape", "the sizes of a call", "nothing", "e.g. --shape 'B1 H8 N4096 D128'")
    directions, element = DIRECTIONS if backward else DIRECTIONS[:1], str(read_dtype(dtype)).removeprefix("torch.")
    found = []
    for place, text in enumerate(specs):
        own, given, rest = text.partition(":=")
        spec = read_spec(rest.strip() if given else text)
        name = own.strip() if given else spec.name or ("attention" if len(specs) == 1 else f"attention{place}")
        found += [Workload(name, spec, Sizes.of(sizes), element, {}, directions) for sizes in shapes]
    return found


def _of_model(path: Path, batches: list[int], contexts: list[int], backward: bool) -> list[Workload]:
    """Each attention of a model under a name that Python takes."""
    config = read_config(path)
    found = workloads(config, batches, contexts, training=backward)
    return [replace(call, name=re.sub(r"\W+", "_", call.name).strip("_")) for call in found]


def _say_how(out: Path, names: list[str], format: Format) -> None:
    if format is Format.HF_KERNELS:
        lines = [
            "from kernels import get_local_kernel",
            f"kernel = get_local_kernel(Path({str(out)!r}))",
            f"kernel.{names[0]}(q, k, v)",
        ]
    else:
        lines = [f"attn = ag.load({str(out)!r})[{names[0]!r}]", "attn(q, k, v)"]
    for line in lines:
        console.print(f"    {line}", markup=False)
