"""The attentions that are measured: each as an attngen spec, as FlexAttention functions, and as what SDPA needs for it.

Every pattern here lets a query see one interval of keys, so its attended pairs are counted exactly and apart from
attngen's own analysis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import attngen as ag

if TYPE_CHECKING:
    from benchmarks.case import Case

Captures = dict[str, Any]
Span = tuple[torch.Tensor, torch.Tensor]  # first key and one past the last, int64 [B or 1, Nq] each


@dataclass(frozen=True)
class Pattern:
    """One attention.

    span: the keys each query sees. captures: the spec's tensors and params, on the CPU, from a seeded generator. learned:
    captures that get a gradient in a backward case. flex_mask, flex_score: captures -> FlexAttention's functions.
    sdpa: "full" or "causal" where SDPA has the mask built in, "mask" where it takes a dense one, "" where it can't.
    sdpa_bias: captures -> what is added to the logits, broadcasting to [B, H, Nq, Nk].
    """

    spec: ag.Spec
    span: Callable[[Case, Captures], Span]
    captures: Callable[[Case, torch.Generator], Captures] = lambda case, generator: {}
    learned: tuple[str, ...] = ()
    flex_mask: Callable[[Captures], Any] | None = None
    flex_score: Callable[[Captures], Any] | None = None
    sdpa: str = "mask"
    sdpa_bias: Callable[[Captures], torch.Tensor] | None = None


def _rows(case: Case) -> torch.Tensor:
    return torch.arange(case.n_q).view(1, -1)


def _full(case: Case, captures: Captures) -> Span:
    rows = _rows(case)
    return torch.zeros_like(rows), torch.full_like(rows, case.n_k)


def _causal(case: Case, captures: Captures) -> Span:
    rows = _rows(case)
    return torch.zeros_like(rows), (rows + 1).clamp(max=case.n_k)


def _window(case: Case, captures: Captures) -> Span:
    rows = _rows(case)
    return (rows - captures["width"] + 1).clamp(min=0), rows + 1


def _two_sided(case: Case, captures: Captures) -> Span:
    rows, width = _rows(case), captures["width"]
    return (rows - width + 1).clamp(min=0), (rows + width).clamp(max=case.n_k)


def _documents(case: Case, captures: Captures) -> Span:
    doc = captures["doc"].cpu()
    return torch.stack([torch.searchsorted(ids, ids) for ids in doc.contiguous()]), _rows(case).expand(len(doc), -1) + 1


def _lengths(case: Case, captures: Captures) -> Span:
    high = captures["lengths"].cpu().long().view(-1, 1).expand(-1, case.n_q)
    return torch.zeros_like(high), high


def _width(case: Case, generator: torch.Generator) -> Captures:
    return {"width": case.setting("width")}


def _random_documents(case: Case, generator: torch.Generator) -> Captures:
    """Sorted ids of documents whose ends are drawn at random, a different draw for each batch."""
    ids = []
    for _ in range(case.batch):
        ends = torch.randperm(case.n_q - 1, generator=generator)[: case.setting("documents") - 1].add(1)
        ids.append(torch.searchsorted(ends.sort().values, torch.arange(case.n_q), right=True))
    return {"doc": torch.stack(ids).int()}


def _given_lengths(case: Case, generator: torch.Generator) -> Captures:
    return {"lengths": torch.tensor(case.setting("lengths"), dtype=torch.int32)}


def _slopes(case: Case, generator: torch.Generator) -> Captures:
    return {"slope": ag.alibi_slopes(case.heads_q)}


def _random_bias(case: Case, generator: torch.Generator) -> Captures:
    return {"bias": torch.randn(case.heads_q, case.n_q, case.n_k, generator=generator)}


def _positions(n: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    place = torch.arange(n, device=device)
    return place.view(-1, 1), place


def _alibi_bias(captures: Captures) -> torch.Tensor:
    slope = captures["slope"]
    i, j = _positions(captures["n"], slope.device)
    return slope.view(-1, 1, 1) * (j - i)


def _flex_causal(captures: Captures) -> Any:
    return lambda b, h, i, j: i >= j


def _flex_window(captures: Captures) -> Any:
    width = captures["width"]
    return lambda b, h, i, j: (i >= j) & (i - j < width)


def _flex_two_sided(captures: Captures) -> Any:
    width = captures["width"]
    return lambda b, h, i, j: (i - j < width) & (j - i < width)


def _flex_documents(captures: Captures) -> Any:
    doc = captures["doc"]
    return lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i >= j)


def _flex_lengths(captures: Captures) -> Any:
    lengths = captures["lengths"]
    return lambda b, h, i, j: j < lengths[b]


def _flex_soft_cap(captures: Captures) -> Any:
    return lambda s, b, h, i, j: 30.0 * torch.tanh(s / 30.0)


def _flex_alibi(captures: Captures) -> Any:
    slope = captures["slope"]
    return lambda s, b, h, i, j: s + slope[h] * (j - i)


def _flex_bias(captures: Captures) -> Any:
    bias = captures["bias"]
    return lambda s, b, h, i, j: s + bias[h, i, j]


WIDTH = ag.Param("width")
LENGTHS = ag.Tensor("lengths", 1, dtype=torch.int32)

PATTERNS: dict[str, Pattern] = {
    "full": Pattern(ag.Spec(), _full, sdpa="full"),
    "causal": Pattern(ag.Spec(mask=ag.causal()), _causal, flex_mask=_flex_causal, sdpa="causal"),
    "causal window": Pattern(ag.Spec(mask=ag.causal() & ag.window(WIDTH)), _window, _width, flex_mask=_flex_window),
    "window": Pattern(ag.Spec(mask=ag.window(WIDTH)), _two_sided, _width, flex_mask=_flex_two_sided),
    "causal documents": Pattern(
        ag.Spec(mask=ag.documents() & ag.causal()), _documents, _random_documents, flex_mask=_flex_documents
    ),
    "lengths": Pattern(
        ag.Spec(mask=lambda b, h, i, j: j < LENGTHS[b]), _lengths, _given_lengths, flex_mask=_flex_lengths
    ),
    "soft cap": Pattern(
        ag.Spec(mask=ag.causal(), score=ag.soft_cap(30.0)),
        _causal,
        flex_mask=_flex_causal,
        flex_score=_flex_soft_cap,
        sdpa="",
    ),
    "alibi": Pattern(
        ag.Spec(mask=ag.causal(), score=ag.alibi()),
        _causal,
        _slopes,
        flex_mask=_flex_causal,
        flex_score=_flex_alibi,
        sdpa_bias=_alibi_bias,
    ),
    "learned bias": Pattern(
        ag.Spec(mask=ag.causal(), score=ag.bias("hij")),
        _causal,
        _random_bias,
        learned=("bias",),
        flex_mask=_flex_causal,
        flex_score=_flex_bias,
        sdpa_bias=lambda captures: captures["bias"],
    ),
}
