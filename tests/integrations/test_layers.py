"""The specs of models' layers, and that transformers' own mask functions come to the same ones."""

import pytest
import torch

import attngen as ag
from attngen.integrations.layers import SINKS, Layer, layer_spec


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Layer(), ag.Spec(mask=ag.causal())),
        (Layer(causal=False), ag.Spec()),
        (Layer(window=64), ag.Spec(mask=ag.causal() & ag.window(64))),
        (Layer(causal=False, window=65), ag.Spec(mask=ag.window(65))),
        (
            Layer(chunk=64),
            ag.Spec.from_text(
                "param shift: int; tensor t0: int[1]; mask: i >= j and (i + shift - t0[b]) // 64 == (j + shift - t0[b]) // 64"
            ),
        ),
        (Layer(soft_cap=50.0), ag.Spec(mask=ag.causal(), score=ag.soft_cap(50.0))),
        (Layer(sinks=True), ag.Spec(mask=ag.causal(), sink=ag.sink(SINKS))),
    ],
    ids=str,
)
def test_what_a_layer_means(layer, expected):
    assert layer.spec.key == expected.key


def test_sizes_are_positive():
    for wrong in (Layer(window=0), Layer(chunk=0), Layer(soft_cap=0.0)):
        with pytest.raises(ag.SpecError, match="positive"):
            _ = wrong.spec


def test_transformers_masks_come_to_the_same_specs():
    masks = pytest.importorskip("transformers.masking_utils")
    for function, layer in (
        (masks.causal_mask_function, Layer()),
        (masks.sliding_window_causal_mask_function(64), Layer(window=64)),
    ):
        traced, captures = ag.from_flex(function)
        assert traced.key == layer.spec.key
        assert captures == {}


def test_a_padded_batch_only_adds_to_the_mask():
    real = ag.Tensor("real", 2, dtype=torch.bool)
    padded = layer_spec(lambda b, h, i, j: (i >= j) & real[b, j], soft_cap=30.0, sinks=1)
    assert (padded.score, padded.sink) == (
        Layer(soft_cap=30.0, sinks=True).spec.score,
        ag.Spec(sink=ag.sink(SINKS)).sink,
    )
