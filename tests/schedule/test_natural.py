"""Default tiles of specs whose logits may be large: they keep their natural unit, and two more rows are in registers."""

from __future__ import annotations

import pytest

import attngen as ag

CAUSAL = ag.causal()
SPECS = {
    "bias": ag.Spec(score=ag.bias("bhij")),
    "bias, causal": ag.Spec(mask=CAUSAL, score=ag.bias("bhij")),
    "bias by distance": ag.Spec(mask=CAUSAL, score=ag.bias("bhrj")),
    "padding bias": ag.Spec(score=lambda s, b, h, i, j: s + ag.Tensor("pad", 2)[b, j]),
    "large constant": ag.Spec(score=lambda s, b, h, i, j: ag.where(i >= j, s, -1e30)),
    "alibi": ag.Spec(mask=CAUSAL, score=ag.alibi()),
    "alibi, documents": ag.Spec(mask=CAUSAL & ag.documents(), score=ag.alibi()),
    "seed on the device": ag.Spec(mask=CAUSAL, dropout=0.1).with_seed_on_device,
    "sink": ag.Spec(mask=CAUSAL, sink=ag.sink()),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", SPECS)
def test_default_tiles_do_not_spill(name: str, target: str) -> None:
    for head_dim in (64, 128):
        for kernel in ag.cross_compile(SPECS[name], target, head_dim=head_dim):
            assert kernel.spills == 0, f"{kernel}, head dim {head_dim}"
