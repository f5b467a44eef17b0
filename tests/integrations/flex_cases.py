"""Mods as people write them for FlexAttention: each case gives (mask_mod, score_mod) and the captured tensors that are learned.

The functions know nothing of attngen. They are plain arithmetic on tensors, so that they also run on index tensors that broadcast
to [B, H, N, N]: that is the dense reference of their gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

B, H, N, D = 2, 4, 72, 16
REAL = torch.float64  # of captured tensors
Case = tuple[Any, Any, dict[str, torch.Tensor]]
CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=REAL, generator=torch.Generator().manual_seed(sum(shape) + 7))


def learned(*shape: int) -> torch.Tensor:
    return randn(*shape).requires_grad_()


def causal_mask(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


# -- masks ------------------------------------------------------------------------------------------------------------


@case
def noop():
    return noop_mask, None, {}


@case
def causal():
    return causal_mask, None, {}


@case
def sliding_window():
    window = 16

    def sliding(b, h, q_idx, kv_idx):
        return q_idx - kv_idx <= window

    return and_masks(causal_mask, sliding), None, {}


@case
def symmetric_window():
    return lambda b, h, q_idx, kv_idx: torch.abs(q_idx - kv_idx) <= 9, None, {}


@case
def prefix_lm():
    prefix_length = torch.tensor([11, 40])

    def prefix(b, h, q_idx, kv_idx):
        return kv_idx < prefix_length[b]

    return or_masks(prefix, causal_mask), None, {}


@case
def documents():
    lengths = [20, 7, 45]
    document_id = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))

    def document(b, h, q_idx, kv_idx):
        return document_id[q_idx] == document_id[kv_idx]

    return and_masks(causal_mask, document), None, {}


@case
def documents_with_local_positions():
    document_id = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 7, 45]))
    offsets = torch.tensor([0, 20, 27])

    def document(inner):
        def mask(b, h, q_idx, kv_idx):
            same = document_id[q_idx] == document_id[kv_idx]
            return same & inner(b, h, q_idx - offsets[document_id[q_idx]], kv_idx - offsets[document_id[kv_idx]])

        return mask

    return document(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < 8)), None, {}


@case
def padded_keys():
    kept = torch.arange(N).expand(B, N) < torch.tensor([[50], [61]])
    return lambda b, h, q_idx, kv_idx: kept[b, kv_idx], None, {}


@case
def lengths_per_batch():
    lengths = torch.tensor([33, 0])  # a batch without keys: its rows are 0
    return lambda b, h, q_idx, kv_idx: torch.logical_and(kv_idx < lengths[b], q_idx >= kv_idx), None, {}


@case
def neighbourhood_2d():
    width, kernel = 9, 5

    def natten(b, h, q_idx, kv_idx):
        q_x, q_y = q_idx // width, q_idx % width
        kv_x, kv_y = kv_idx // width, kv_idx % width
        x = q_x.clamp(kernel // 2, (N // width - 1) - kernel // 2)
        y = q_y.clamp(kernel // 2, (width - 1) - kernel // 2)
        return ((x - kv_x).abs() <= kernel // 2) & ((y - kv_y).abs() <= kernel // 2)

    return natten, None, {}


@case
def dilated_window():
    def dilated(b, h, q_idx, kv_idx):
        diff = torch.abs(q_idx - kv_idx)
        return torch.logical_and(diff <= 24, torch.remainder(diff, 3) == 0)

    return dilated, None, {}


@case
def stand_alone_blocks():
    return (
        lambda b, h, q_idx, kv_idx: torch.floor_divide(q_idx, 16) == torch.div(kv_idx, 16, rounding_mode="floor"),
        None,
        {},
    )


@case
def global_and_local():
    return (
        or_masks(lambda b, h, q, kv: kv < 4, lambda b, h, q, kv: q < 4, lambda b, h, q, kv: (q - kv).abs() < 7),
        None,
        {},
    )


@case
def checkerboard():
    return lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 2 == 0, None, {}


@case
def different_per_head():
    def per_head(b, h, q_idx, kv_idx):
        return torch.where(h < 2, q_idx >= kv_idx, q_idx <= kv_idx)

    return per_head, None, {}


@case
def not_causal():
    return lambda b, h, q_idx, kv_idx: ~causal_mask(b, h, q_idx, kv_idx), None, {}


@case
def exclusive_or():
    return lambda b, h, q_idx, kv_idx: torch.logical_xor(q_idx >= kv_idx, kv_idx % 5 == 0), None, {}


@case
def mask_of_all_pairs():
    allowed = randn(B, H, N, N) > 0
    return lambda b, h, q_idx, kv_idx: allowed[b, h, q_idx, kv_idx], None, {}


@case
def bits_of_positions():
    return lambda b, h, q_idx, kv_idx: (q_idx ^ kv_idx) & (1 << 2) == 0, None, {}


@case
def morton_order():
    def group(x):
        return (x >> 3) | ((x & 7) << 4)

    return lambda b, h, q_idx, kv_idx: group(q_idx) >= group(kv_idx), None, {}


@case
def truth_values_as_numbers():
    def mask(b, h, q_idx, kv_idx):
        return ((q_idx >= kv_idx).int() + (kv_idx < 10).to(torch.int32)) * (h != 1) > 0

    return mask, None, {}


@case
def product_of_conditions():
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) * (q_idx - kv_idx < 30), None, {}


@case
def offset_of_queries():
    offset = torch.tensor(5)
    return lambda b, h, q_idx, kv_idx: q_idx + offset >= kv_idx, None, {}


@case
def partial_function():
    def windowed(b, h, q_idx, kv_idx, size):
        return (q_idx >= kv_idx) & (q_idx < kv_idx + size)

    return functools.partial(windowed, size=20), None, {}


class Striped:
    def __init__(self, stride: int):
        self.stride = stride

    def __call__(self, b, h, q_idx, kv_idx):
        return (kv_idx % self.stride == 0) | (q_idx == kv_idx)


@case
def callable_object():
    return Striped(6), None, {}


# -- scores -----------------------------------------------------------------------------------------------------------


@case
def identity():
    return None, lambda score, b, h, q_idx, kv_idx: score, {}


@case
def relative_position():
    return None, lambda score, b, h, q_idx, kv_idx: score + (q_idx - kv_idx), {}


@case
def relative_position_if_causal():
    return (
        None,
        lambda score, b, h, q_idx, kv_idx: torch.where(q_idx >= kv_idx, score + (q_idx - kv_idx) / 8, score),
        {},
    )


@case
def causal_as_score():
    def causal(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score, float("-inf"))

    return None, causal, {}


@case
def masked_fill():
    return None, lambda score, b, h, q_idx, kv_idx: score.masked_fill(kv_idx > q_idx, -math.inf) * 2.0, {}


@case
def infinite_sum_of_scores():
    def window(score, b, h, q_idx, kv_idx):
        bias = torch.where((q_idx - kv_idx).abs() < 12, 0.0, -float("inf"))
        return score + bias

    return None, window, {}


@case
def infinite_tensor():
    def causal(score, b, h, q_idx, kv_idx):
        return torch.where(kv_idx <= q_idx, score, torch.full_like(score, -float("inf")))

    return None, causal, {}


@case
def alibi():
    slopes = torch.exp2(-torch.arange(1, H + 1, dtype=REAL)).requires_grad_()

    def score(score, b, h, q_idx, kv_idx):
        return score + (kv_idx - q_idx) * slopes[h]

    return causal_mask, score, {"slopes": slopes}


@case
def alibi_of_a_formula():
    def score(score, b, h, q_idx, kv_idx):
        return score + torch.exp2(-((h + 1) * 8.0 / H)) * (kv_idx - q_idx)

    return causal_mask, score, {}


@case
def soft_cap():
    cap = 2.5

    def score(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)

    return causal_mask, score, {}


@case
def soft_cap_by_method():
    return None, lambda score, b, h, q_idx, kv_idx: score.div(3).tanh().mul(3), {}


@case
def bias_of_pairs():
    bias = learned(B, H, N, N)
    return None, lambda score, b, h, q_idx, kv_idx: score + bias[b, h, q_idx, kv_idx], {"bias": bias}


@case
def bias_of_a_head():
    bias = learned(H)
    return None, lambda score, b, h, q_idx, kv_idx: score * bias[h], {"bias": bias}


@case
def bias_by_distance():
    table = learned(2 * N - 1)
    return None, lambda score, b, h, q_idx, kv_idx: score + table[q_idx - kv_idx + N - 1], {"table": table}


@case
def bias_by_clamped_distance():
    table = learned(17, H)

    def score(score, b, h, q_idx, kv_idx):
        return score + table[torch.clamp(q_idx - kv_idx, -8, 8) + 8, h]

    return causal_mask, score, {"table": table}


@case
def bias_of_documents():
    document, bias = torch.arange(N) // 20, learned(4, 4)
    return None, lambda score, b, h, q_idx, kv_idx: score + bias[document[q_idx], document[kv_idx]], {"bias": bias}


@case
def temperature():
    heat = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    return None, lambda score, b, h, q_idx, kv_idx: score * heat, {"heat": heat}


@case
def gated_bias():
    gate, bias = learned(H), learned(N)

    def score(score, b, h, q_idx, kv_idx):
        return score + torch.sigmoid(gate[h]) * bias[kv_idx]

    return None, score, {"gate": gate, "bias": bias}


@case
def computed_of_captures_alone():
    raw = learned(H)

    def score(score, b, h, q_idx, kv_idx):
        slopes = torch.exp(raw) * 0.1  # of the whole tensor, inside the mod
        return score - slopes[h] * (q_idx - kv_idx).abs()

    return None, score, {"raw": raw}


@case
def made_by_factories():
    def score(score, b, h, q_idx, kv_idx):
        half = torch.tensor(0.5, dtype=score.dtype, device=score.device)
        return torch.where(q_idx >= kv_idx, score * half, score + torch.zeros_like(score)) + score.new_ones(())

    return None, score, {}


@case
def odd_heads_doubled():
    return None, lambda score, b, h, q_idx, kv_idx: torch.where(h % 2 == 1, score * 2, score), {}


@case
def batch_scaled():
    return None, lambda score, b, h, q_idx, kv_idx: score * (b + 1) + h, {}


@case
def squared():
    return None, lambda score, b, h, q_idx, kv_idx: score * score - score**2 / 2, {}


@case
def activations():
    def score(score, b, h, q_idx, kv_idx):
        smooth = torch.nn.functional.silu(score) + torch.nn.functional.gelu(score) + torch.nn.functional.softplus(score)
        return smooth + torch.relu(score) - torch.nn.functional.leaky_relu(score, 0.1)

    return None, score, {}


@case
def trigonometry():
    def score(score, b, h, q_idx, kv_idx):
        return score + torch.cos((q_idx - kv_idx) * 0.3) - torch.sin(score) + torch.erf(score)

    return None, score, {}


@case
def roots_and_logarithms():
    def score(score, b, h, q_idx, kv_idx):
        return score - torch.log((q_idx - kv_idx).abs() + 1) + torch.sqrt(kv_idx + 1.0) * torch.rsqrt(1.0 + q_idx)

    return causal_mask, score, {}


@case
def logarithm_of_length():
    return causal_mask, lambda score, b, h, q_idx, kv_idx: score * torch.log2(q_idx.to(score.dtype) + 2), {}


@case
def clamped():
    return None, lambda score, b, h, q_idx, kv_idx: torch.minimum(score.clamp(-1, 1), score * 0.5 + 0.1), {}


@case
def extremes():
    def score(score, b, h, q_idx, kv_idx):
        return torch.maximum(score, -score) + torch.max(q_idx, kv_idx) * 0.01 - score.abs().clamp(min=0.5)

    return None, score, {}


@case
def rounded():
    def score(score, b, h, q_idx, kv_idx):
        return (
            score + torch.floor(q_idx / 7) - torch.round(kv_idx / 8) + torch.ceil(h / 3) + torch.trunc((kv_idx - 9) / 4)
        )

    return None, score, {}


@case
def integers_of_floats():
    table = learned(12)
    return None, lambda score, b, h, q_idx, kv_idx: score + table[(kv_idx / 6.5).long()], {"table": table}


@case
def division_towards_zero():
    def score(score, b, h, q_idx, kv_idx):
        return score + torch.div(q_idx - kv_idx, 5, rounding_mode="trunc") - torch.fmod(q_idx - kv_idx, 4)

    return None, score, {}


@case
def methods():
    kept = learned(N)

    def score(score, b, h, q_idx, kv_idx):
        near = q_idx.sub(kv_idx).abs().le(9).logical_and(kv_idx.remainder(3).ne(1))
        return score.where(near, kept[kv_idx]).add(kept[..., 2], alpha=0.5).clamp_min(-1.5) + near.to(score)

    return causal_mask, score, {"kept": kept}


@case
def sign_and_reciprocal():
    def score(score, b, h, q_idx, kv_idx):
        return (
            torch.add(score, torch.sign(kv_idx - q_idx), alpha=0.5) - torch.reciprocal(kv_idx + 2.0) + 1 / (q_idx + 1)
        )

    return None, score, {}


@case
def score_and_mask_read_the_same():
    kind, weight = torch.arange(N) % 3, learned(3)

    def mask(b, h, q_idx, kv_idx):
        return (kind[kv_idx] != 2) | (q_idx == kv_idx)

    return mask, lambda score, b, h, q_idx, kv_idx: score + weight[kind[kv_idx]], {"weight": weight}


@case
def pages_of_keys():
    to_logical, page = torch.tensor([2, 0, 1, 3]), 18  # where a physical page stands in the sequence

    def logical(kv_idx):
        return to_logical[kv_idx // page] * page + kv_idx % page

    def mask(b, h, q_idx, kv_idx):
        return q_idx >= logical(kv_idx)

    return mask, lambda score, b, h, q_idx, kv_idx: score + (logical(kv_idx) - q_idx) * 0.05, {}
