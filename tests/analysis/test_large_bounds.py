"""Bounds of a mask far past every position: sums of a table's values with positions fit 32 bits."""

import pytest
import torch

import attngen as ag

W = ag.Tensor("w", 1, torch.int64)


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
@pytest.mark.parametrize(
    ("mask", "captures"),
    [
        ("i >= j and i - j < 1e30", {}),
        ("i >= j and i - j < 1e300", {}),  # its canonical text is a word of more than a line
        (lambda b, h, i, j: (i >= j) & (W[j] >= i), {"w": torch.full((200,), 2**31 - 1)}),
    ],
)
def test_a_bound_beyond_every_position_masks_nothing(backend, mask, captures):
    inputs = [torch.randn(1, 1, 200, 16, requires_grad=True) for _ in range(3)]
    results = []
    for spec in (ag.Spec(mask=mask), ag.Spec(mask=ag.causal())):
        out = ag.compile(spec, backend=backend)(*inputs, **(captures if spec.tensors else {}))
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
