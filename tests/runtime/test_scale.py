"""`scale=` at a call: the spec's factor on q.k replaced, in both directions, for every spec, and nothing compiled for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.language.call import bind
from tests.keys_cases import compare
from tests.keys_work import CASES, case
from tests.runtime.test_compile import SPECS, agree, leaves

SIZE = (1, 2, 2, 70, 90, 0)


def results(attn: Any, **named: Any) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k and v."""
    own = leaves()
    out, lse = attn(*own, return_lse=True, **named)
    loss = out.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
    return [out, lse, *torch.autograd.grad(loss, own)]


@pytest.mark.parametrize("name", [name for name in SPECS if name != "union"])
def test_it_is_the_specs_scale_replaced(name: str):
    keys, captures = SPECS[name]
    mask = ag.causal()
    attn = ag.compile(ag.Spec(keys=keys, mask=mask, scale=3.0))
    for scale in (0.7, 0.05):  # the second call is one of a known signature
        fixed = ag.compile(ag.Spec(keys=keys, mask=mask, scale=scale))
        if name == "paged":
            found, expected = (
                [*a(*leaves(), return_lse=True, **captures, **s)] for a, s in ((attn, {"scale": scale}), (fixed, {}))
            )
        else:
            found, expected = results(attn, scale=scale, **captures), results(fixed, **captures)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want)
    own = ag.compile(ag.Spec(keys=keys, mask=mask))
    torch.testing.assert_close(own(*leaves(), scale=None, **captures), own(*leaves(), **captures))


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
@pytest.mark.parametrize("name", ["qk_sparse", "gather", "union"])
def test_of_key_sets_against_the_oracle(name: str, backend: str):
    """Of a union it is that of every piece."""
    keys, captures = case(name, SIZE)
    compare(ag.Spec(keys=keys), SIZE, {**captures, "scale": 0.4}, backend)


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_of_masks_and_scores_against_the_oracle(backend: str):
    captures = dict(slope=ag.alibi_slopes(4), sink=torch.randn(4), scale=0.6)
    compare(ag.Spec(mask=ag.window(20), score=[ag.soft_cap(3.0), ag.alibi()], sink=ag.sink()), SIZE, captures, backend)
    compare(ag.Spec(mask=ag.causal(), scale=-0.2), SIZE, {"scale": 0.6}, backend)  # the spec's own sign does not matter


def test_few_rows_and_half_types():
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 300, 16), torch.randn(1, 4, 300, 16)
    spec = ag.Spec(mask=ag.causal())
    found = ag.compile(spec)(q, k, v, q_offset=299, scale=0.9)
    torch.testing.assert_close(
        found.double(), ag.oracle(spec, q, k, v, q_offset=299, scale=0.9)[0], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.9))


@pytest.mark.parametrize("name", ["plain", "k_len", "packed", "big_bird", "qk_sparse", "graph"])
def test_under_torch_compile(name: str):
    keys, captures = SPECS[name]
    agree(ag.compile(ag.Spec(keys=keys, mask=ag.causal())), {**captures, "scale": 0.3})


def test_changed_under_torch_compile():
    """torch makes a graph for each float, as it does for SDPA's; each has the value that it was called with."""
    attn = ag.compile(ag.Spec(mask=ag.causal()))
    q, k, v = (t.detach() for t in leaves())
    torch._dynamo.reset()
    compiled = torch.compile(lambda scale: attn(q, k, v, scale=scale), fullgraph=True, backend="aot_eager")
    for scale in (0.1, 0.7, None, 0.1, 2):
        torch.testing.assert_close(compiled(scale), attn(q, k, v, scale=scale))


def test_with_a_preparation_and_a_seed_on_the_device():
    keys, captures = SPECS["qk_sparse"]
    attn = ag.compile(ag.Spec(keys=keys, mask=ag.causal()))
    q, k, v = leaves()
    prepared = attn.prepare(q, k, v, **captures)
    assert torch.equal(attn(q, k, v, plan=prepared, scale=0.8), attn(q, k, v, scale=0.8, **captures))
    dropped = ag.compile(ag.Spec(mask=ag.causal(), dropout=0.3))
    seeds = dict(scale=0.8, seed=5), dict(scale=0.8, seed=torch.tensor(5))
    assert torch.equal(dropped(q, k, v, **seeds[0]), dropped(q, k, v, **seeds[1]))


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (0, "a finite number above 0, got 0.0; a factor of another sign belongs to the spec"),
        (-1.0, "a finite number above 0, got -1.0"),
        (float("nan"), "a finite number above 0, got nan"),
        (float("inf"), "a finite number above 0, got inf"),
        ("0.1", "a Python float, got str '0.1'"),
        (True, "a Python float, got bool True"),
        (torch.ones(()), r"a Python float, got a tensor of shape \[\]; for one on the device declare"),
    ],
)
def test_bad_scales(scale: Any, says: str):
    q, k, v = leaves()
    with pytest.raises(ag.InputError, match=f"scale: expected {says}"):
        ag.compile(ag.Spec())(q, k, v, scale=scale)
    with pytest.raises(ag.InputError, match=f"scale: expected {says}"):
        bind(ag.Spec(), q, k, v, captures={"scale": scale})


def test_its_name_is_taken():
    with pytest.raises(ag.SpecError, match="'scale' is taken"):
        ag.Param("scale")


def test_every_key_set_has_a_case():
    assert {*CASES} <= {*SPECS}
