"""attngen's FlexAttention and torch's own, compiled: what its users run. On a CPU it has no gradients; those are compared with its
eager form in `test_flex.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torchs

from attngen import flex
from tests.integrations import flex_cases
from tests.integrations.flex_cases import CASES, B, D, H, N

LIMIT = 1e-5  # tests.check's bound for results in float32


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_same_as_torchs_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        flex_cases, "REAL", torch.float32
    )  # torch's kernel reads captured float64 as if they were float32
    mask_mod, score_mod, learned = CASES[name]()
    for tensor in learned.values():
        tensor.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(B, H, N, D, generator=generator) for _ in range(3))
    sizes = dict(B=B, H=H, Q_LEN=N, KV_LEN=N, device="cpu")
    theirs = None if mask_mod is None else torchs.create_block_mask(mask_mod, **sizes)
    own = None if mask_mod is None else flex.create_block_mask(mask_mod, **sizes)
    torch._dynamo.reset()
    want = torch.compile(torchs.flex_attention, fullgraph=True)(q, k, v, score_mod, theirs)
    got = flex.flex_attention(q, k, v, score_mod, own)
    assert (got - want).norm() <= LIMIT * want.norm()
