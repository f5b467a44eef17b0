"""Host time of a call: everything but what the device does, one thread. `python -m benchmarks.host`

Kernels are launched by nothing here: arguments are made and checked, buffers allocated, grids computed, and the launch itself is
left out. So no GPU is needed, and what a device would do meanwhile does not hide anything. Tensors lie on the CPU, so that
operations on them that a GPU would be handed (index arithmetic of a preparation, row moves, the tables of documents) run here
too, at sizes where they cost about what handing them over would.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

import attngen as ag
from attngen.backends import interpret
from attngen.backends.triton import launch

ROUNDS, CALLS = 15, 100
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Case:
    """name: what is called; limit: microseconds that it may take; make: the call, and the peers' by name."""

    name: str
    limit: float | None
    make: Callable[[], dict[str, Callable[[], Any]]]


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Within it, kernels are not run."""
    with (
        mock.patch.object(launch, "_start", lambda *_: None),
        mock.patch.object(interpret, "interpreting", contextlib.nullcontext),
    ):
        yield


def microseconds(run: Callable[[], Any], rounds: int = ROUNDS, calls: int = CALLS) -> float:
    """Of one call: the median over rounds of the mean in a round."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


N = 32  # rows of 8 heads are 64 KiB: from 128 on the C library would map fresh pages for every result, which no GPU does


def rows(n_q: int = N, n_k: int = N, grads: bool = False) -> list[torch.Tensor]:
    """q, k, v of one batch, 8 and 2 heads of dimension 64."""
    sizes = (8, n_q), (2, n_k), (2, n_k)
    return [torch.randn(1, heads, n, 64).requires_grad_(grads) for heads, n in sizes]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def _training(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor], do: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(run(), leaves, do)


def _causal() -> dict[str, Any]:
    q, k, v = rows()
    attn = ag.compile(ag.Spec(mask=ag.causal()), backend="interpret")
    return {"attngen": lambda: attn(q, k, v), "sdpa": _sdpa(q, k, v), "flex": _flex(q, k, v)}


def _documents(prepared: bool) -> dict[str, Any]:
    q, k, v = rows()
    doc = (torch.arange(N) // 10).int()[None]
    attn = ag.compile(ag.Spec(mask=ag.causal() & ag.documents()), backend="interpret")
    if not prepared:
        return {"attngen": lambda: attn(q, k, v, doc=doc)}
    plan = attn.prepare(q, k, v, doc=doc)
    return {"attngen": lambda: attn(q, k, v, doc=doc, plan=plan)}


def _backward() -> dict[str, Any]:
    q, k, v = rows(grads=True)
    do = torch.randn(q.shape)
    attn = ag.compile(ag.Spec(mask=ag.causal()), backend="interpret")
    return {
        "attngen": _training(lambda: attn(q, k, v), [q, k, v], do),
        "sdpa": _training(_sdpa(q, k, v), [q, k, v], do),
    }


def _decode() -> dict[str, Any]:
    q, k, v = rows(1, 512)
    attn = ag.compile(ag.Spec(), backend="interpret", schedule=ag.Schedule(split="stream"))
    return {"attngen": lambda: attn(q, k, v, q_offset=511), "sdpa": _sdpa(q, k, v)}


def _qk_sparse() -> dict[str, Any]:
    q, k, v = rows()
    keep = dict(keep_q=torch.rand(1, 8, N) < 0.5, keep_k=torch.rand(1, 2, N) < 0.5)
    attn = ag.compile(ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()), backend="interpret")
    plan = attn.prepare(q, k, v, **keep)
    return {"attngen": lambda: attn(q, k, v, plan=plan)}


def _token() -> dict[str, Any]:
    q, k, v = rows(1, 512)
    attn = ag.compile(ag.Spec(mask=ag.causal()))
    return {"attngen": lambda: attn(q, k, v, q_offset=511), "sdpa": _sdpa(q, k, v)}


LAUNCHED = [
    Case("causal forward", 25, _causal),
    Case("documents, with a preparation", 35, lambda: _documents(True)),
    Case("documents, without", 60, lambda: _documents(False)),
    Case("causal forward + backward", 80, _backward),
    Case("stream-K decode", 40, _decode),
    Case("qk_sparse, with a preparation", 100, _qk_sparse),
]
WHOLE = [Case("one token, CPU backend, 512 keys (the whole call)", 100, _token)]


@app.command()
def main(only: str = typer.Option("", help="Cases whose name has this text.")) -> None:
    """Microseconds of a call on the host, beside its limit, FlexAttention's and SDPA's own."""
    torch.set_num_threads(1)
    table = Table("call", "limit", "attngen", "sdpa", "flex", title="host time in microseconds")
    for cases, nothing in ((LAUNCHED, True), (WHOLE, False)):
        for case in cases:
            if only not in case.name:
                continue
            with launching_nothing() if nothing else contextlib.nullcontext():
                found = {name: microseconds(run) for name, run in case.make().items()}
            shown = [f"{found[peer]:.1f}" if peer in found else "" for peer in ("attngen", "sdpa", "flex")]
            table.add_row(case.name, f"{case.limit:g}" if case.limit else "", *shown)
    Console().print(table)


if __name__ == "__main__":
    app()
