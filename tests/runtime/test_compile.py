"""`torch.compile(fullgraph=True)` of every spec: the values and gradients of eager mode, and no break of the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from tests.keys_work import CASES, case

N = 96
SIZE = (1, 2, 2, N, N, 0)
LINE = torch.arange(3).expand(1, 4, 3)
ENDS = torch.tensor([0, 40, N])
# A key set, or None, and its captures; the mask is causal.
SPECS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: case(name, SIZE) for name in CASES},
    "butterfly": (ag.butterfly(), {}),
    "big_bird": (ag.big_bird(), {}),
    "longformer": (ag.longformer(40, globals=3), {}),
    "a_shape": (ag.a_shape(3, 40), {}),
    "pruned": (ag.pruned(0.5, heads=0.5), {}),
    "vertical_slash": (ag.vertical_slash(), dict(vertical=LINE * 20, slash=LINE * 9)),
    "block_sparse": (ag.block_sparse((32, 32)), dict(layout=torch.ones(1, 4, 3, 3, dtype=torch.bool))),
    "block_cluster": (ag.block_cluster(32), dict(index=torch.arange(2).expand(1, 4, 3, 2))),
    "shared_prefix": (ag.shared_prefix(), dict(prefix_k=torch.randn(1, 2, 37, 16), prefix_v=torch.randn(1, 2, 37, 16))),
    "k_len": (None, dict(k_len=torch.tensor([50]))),
    "packed": (None, dict(cu_q=ENDS, cu_k=ENDS)),
    "plain": (None, {}),
}


def leaves() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, N, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2)]


def agree(attn: Any, captures: dict[str, Any]) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: Any) -> torch.Tensor:
        return attn(q, k, v, **named)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    learned = {n: x.clone().requires_grad_() for n, x in captures.items() if _is_float(x)}
    results = []
    for run in (call, compiled):
        own = leaves()
        out = run(*own, **{**captures, **learned})
        results.append([out, *torch.autograd.grad(out.square().sum(), [*own, *learned.values()])])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("name", SPECS)
def test_every_key_set_and_ragged_lengths(name: str):
    keys, captures = SPECS[name]
    agree(ag.compile(ag.Spec(keys=keys, mask=None if name == "union" else ag.causal())), captures)


@pytest.mark.parametrize("name", ["qk_sparse", "hyper", "sparse_k"])
def test_with_a_preparation(name: str):
    keys, captures = SPECS[name]
    attn = ag.compile(ag.Spec(keys=keys, mask=ag.causal()))
    prepared = attn.prepare(*leaves(), **captures)
    used = {name: captures[name] for name in keys.used}
    agree(lambda *rows, **named: attn(*rows, plan=prepared, **named), used)


@pytest.mark.parametrize(
    "lengths",
    [dict(k_len=torch.tensor([50])), dict(k_offset=torch.tensor([7])), dict(cu_q=ENDS, cu_k=ENDS)],
    ids=lambda lengths: next(iter(lengths)),
)
def test_ragged_lengths_with_a_preparation(lengths: dict[str, torch.Tensor]):
    attn = ag.compile(ag.Spec(mask=ag.causal()))
    prepared = attn.prepare(*leaves(), **lengths)
    agree(lambda *rows, **named: attn(*rows, plan=prepared, **named), lengths)
    eager = attn(*leaves(), **lengths)
    assert torch.equal(attn(*leaves(), plan=prepared, **lengths), eager)
    assert not torch.allclose(attn(*leaves()), eager)  # the lengths count
    name, value = next(iter(lengths.items()))
    with pytest.raises(ag.InputError, match=f"{name}: expected what the plan was made from"):
        attn(*leaves(), plan=prepared, **{**lengths, name: value - (value > 0).long() * (value < N).long()})


def test_a_seed_on_the_device_at_the_first_call():
    agree(ag.compile(ag.Spec(mask=ag.causal(), dropout=0.2)), dict(seed=torch.tensor(5)))


def test_documents_with_their_tables():
    attn = ag.compile(ag.Spec(mask=ag.causal() & ag.documents(), score=ag.alibi(), sink=ag.sink()))
    captures = dict(doc=(torch.arange(N) // 30).int()[None], slope=torch.rand(4), sink=torch.randn(4))
    agree(attn, captures)
    prepared = attn.prepare(*leaves(), **captures)
    agree(lambda *rows, **named: attn(*rows, plan=prepared, **named), captures)


def test_pages():
    attn = ag.compile(ag.Spec(keys=ag.paged(16), mask=ag.causal()))
    q, pages = torch.randn(2, 4, 1, 16), torch.randn(8, 16, 2, 16)
    captures = dict(
        page_table=torch.randperm(8).view(2, 4), k_len=torch.tensor([40, 64]), q_offset=torch.tensor([39, 63])
    )
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v, **named: attn(q, k, v, **named), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, pages, pages, **captures), attn(q, pages, pages, **captures))
