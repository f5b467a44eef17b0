"""`attngen.flex` in the place of torch's FlexAttention: the same functions, the same results and gradients."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from torch.nn.attention import flex_attention as torchs
from torch.utils._python_dispatch import TorchDispatchMode

import attngen as ag
from attngen import flex
from attngen.integrations.flex.attention import _compiled
from attngen.integrations.flex.options import schedule_of
from tests.integrations.flex_cases import CASES, B, D, H, N, causal_mask, randn


@pytest.fixture(autouse=True)
def without_dynamo(monkeypatch):
    """torch's eager FlexAttention is compiled with a backend that does nothing: each mod would be traced by Dynamo for that."""
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture(autouse=True)
def in_float64():
    """To torch `0.1 * (q_idx - kv_idx)` is of the default dtype: what is compared with has none of its rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inputs(dtype=torch.float64, heads=H, kv_heads=H, n_q=N, n_k=N, batch=B):
    shapes = ((batch, heads, n_q, D), (batch, kv_heads, n_k, D), (batch, kv_heads, n_k, D))
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


def torch_mask(mask_mod, n_q=N, n_k=N, batch=B, heads=H, block=128):
    return None if mask_mod is None else torchs.create_block_mask(mask_mod, batch, heads, n_q, n_k, "cpu", block)


def own_mask(mask_mod, n_q=N, n_k=N, batch=B, heads=H):
    return None if mask_mod is None else flex.create_block_mask(mask_mod, batch, heads, n_q, n_k, "cpu")


def torch_result(q, k, v, score_mod=None, block_mask=None, **options):
    """out and lse of torch's FlexAttention, which has no gradients on a CPU."""
    with torch.no_grad():
        q, k, v = (x.detach() for x in (q, k, v))
        out, aux = torchs.flex_attention(
            q, k, v, score_mod, block_mask, return_aux=torchs.AuxRequest(lse=True), **options
        )
    return out, aux.lse


def dense(q, k, v, mask_mod, score_mod):
    """out from the weights of all pairs: the mods run on indices that broadcast."""
    b, h = torch.arange(q.shape[0]).view(-1, 1, 1, 1), torch.arange(q.shape[1]).view(1, -1, 1, 1)
    i, j = torch.arange(q.shape[2]).view(1, 1, -1, 1), torch.arange(k.shape[2]).view(1, 1, 1, -1)
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[3])
    score = score if score_mod is None else score_mod(score, b, h, i, j)
    if mask_mod is not None:
        score = torch.where(mask_mod(b, h, i, j), score, -torch.inf)
    empty = score.isneginf().all(-1, keepdim=True)
    return torch.where(empty, 0.0, torch.where(empty, 0.0, score).softmax(-1)) @ v


def close(got, want, limit=1e-11):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.equal(got.isneginf(), want.isneginf())
    difference = (got - want).masked_fill(want.isneginf(), 0).norm()
    assert difference <= limit * max(1.0, want.masked_fill(want.isneginf(), 0).norm())


@pytest.mark.parametrize("name", CASES)
def test_same_as_torch(name):
    mask_mod, score_mod, learned = CASES[name]()
    q, k, v = inputs()
    want, want_lse = torch_result(q, k, v, score_mod, torch_mask(mask_mod))
    leaves = [x.requires_grad_() for x in (q, k, v)] + list(learned.values())
    out, lse = flex.flex_attention(q, k, v, score_mod, own_mask(mask_mod), return_lse=True)
    close(out, want)
    close(lse, want_lse)
    weight = randn(*out.shape)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    expected = torch.autograd.grad((dense(q, k, v, mask_mod, score_mod) * weight).sum(), leaves)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs, 1e-10)


@pytest.mark.parametrize(
    "name",
    ["sliding_window", "documents", "alibi", "bias_by_distance", "bias_of_documents", "causal_as_score", "soft_cap"],
)
def test_generated_kernels(name):
    mask_mod, score_mod, learned = CASES[name]()
    q, k, v = inputs(torch.float32)
    want, want_lse = torch_result(*inputs(), score_mod, torch_mask(mask_mod))
    leaves = [x.requires_grad_() for x in (q, k, v)] + list(learned.values())
    options = {
        "BLOCK_M": 32,
        "BLOCK_N": 32,
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 32,
        "bwd_BLOCK_M2": 32,
        "bwd_BLOCK_N2": 32,
    }
    out, lse = flex.flex_attention(
        q, k, v, score_mod, own_mask(mask_mod), return_lse=True, kernel_options=options, backend="interpret"
    )
    close(out.double(), want, 1e-5)
    close(lse.double(), want_lse, 1e-5)
    got = torch.autograd.grad(out.sum(), leaves)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(dense(*wide, mask_mod, score_mod).sum(), [*wide, *learned.values()])
    for mine, theirs in zip(got, expected, strict=True):
        close(mine.double(), theirs, 1e-4)


# -- block masks ------------------------------------------------------------------------------------------------------


def block_lists(blocks):
    """Counts and indices as FlexAttention wants them, from bool [B, H, blocks, blocks]."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def random_blocks(share=0.5, blocks=4):
    live = torch.rand(B, H, blocks, blocks, generator=torch.Generator().manual_seed(2)) < share
    live[..., 0, :] = False  # a row of blocks that sees nothing
    return live


def of_blocks(blocks, size, n=N):
    return blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :n, :n]


def test_lists_of_blocks_alone():
    live, (q, k, v) = random_blocks(), inputs(n_q=64, n_k=64)
    block_mask = flex.BlockMask.from_kv_blocks(*block_lists(live), BLOCK_SIZE=16)
    pairs = of_blocks(live, 16, 64)
    out, lse = flex.flex_attention(q, k, v, None, block_mask, return_lse=True)
    close(out, dense(q, k, v, lambda b, h, i, j: pairs[b, h, i, j], None))
    assert lse[:, :, :16].isneginf().all() and not out[:, :, :16].any()


@pytest.mark.parametrize("full", [False, True])
def test_mask_inside_listed_blocks(full):
    """Partial blocks take the mask, full ones do not, as in torch's kernels (its eager code ignores the lists)."""
    live, (q, k, v) = random_blocks(), inputs(n_q=64, n_k=64)
    whole = random_blocks(0.2) if full else torch.zeros_like(live)
    partial = live & ~whole
    lists = (*block_lists(partial), *(block_lists(whole) if full else ()))
    block_mask = torchs.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=16, mask_mod=causal_mask)
    pairs = of_blocks(whole, 16, 64) | (of_blocks(partial, 16, 64) & torch.ones(64, 64, dtype=torch.bool).tril())
    close(flex.flex_attention(q, k, v, None, block_mask), dense(q, k, v, lambda b, h, i, j: pairs[b, h, i, j], None))


def test_lists_that_change_in_place():
    q, k, v = inputs(n_q=64, n_k=64)
    block_mask = torchs.create_block_mask(causal_mask, B, H, 64, 64, "cpu", 16)
    close(flex.flex_attention(q, k, v, None, block_mask), dense(q, k, v, causal_mask, None))
    block_mask.full_kv_num_blocks[:, :, 3] = 0
    kept = of_blocks(torch.tensor([[[[1] * 4] * 3 + [[0, 0, 0, 1]]]]).bool(), 16, 64)[0, 0]
    want = dense(q, k, v, lambda b, h, i, j: causal_mask(b, h, i, j) & kept[i, j], None)
    close(flex.flex_attention(q, k, v, None, block_mask), want)


@pytest.mark.parametrize("name", ["sliding_window", "documents", "different_per_head", "lengths_per_batch"])
def test_torchs_own_block_mask(name):
    mask_mod, _, _ = CASES[name]()
    q, k, v = inputs()
    block_mask = torch_mask(mask_mod, block=32)
    close(flex.flex_attention(q, k, v, None, block_mask), torch_result(q, k, v, None, block_mask)[0])


@pytest.mark.parametrize(
    "name", ["causal", "sliding_window", "documents", "different_per_head", "noop", "lengths_per_batch"]
)
@pytest.mark.parametrize("separate", [True, False])
def test_lists_of_a_lazy_mask_are_torchs(name, separate):
    mask_mod, _, _ = CASES[name]()
    lazy = flex.create_block_mask(mask_mod, B, H, N, N, "cpu", 16, separate_full_blocks=separate)
    want = torchs.create_block_mask(mask_mod, B, H, N, N, "cpu", 16, separate_full_blocks=separate)
    assert isinstance(lazy, flex.BlockMask) and lazy.shape == want.shape and lazy.BLOCK_SIZE == (16, 16)
    assert torch.equal(lazy.to_dense(), want.to_dense())
    assert lazy.sparsity() == want.sparsity()
    for side in ("kv", "q"):
        for prefix in ("", "full_") if separate else ("",):
            counts = getattr(want, f"{prefix}{side}_num_blocks")
            assert torch.equal(getattr(lazy, f"{prefix}{side}_num_blocks"), counts)
            listed = torch.arange(getattr(want, f"{prefix}{side}_indices").shape[-1]) < counts[..., None]
            indices = getattr(lazy, f"{prefix}{side}_indices")
            assert torch.equal(indices[listed], getattr(want, f"{prefix}{side}_indices")[listed])
    assert separate or lazy.full_kv_num_blocks is None


class NothingLarge(TorchDispatchMode):
    """No tensor of 2**24 elements is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        assert not isinstance(made, torch.Tensor) or made.numel() < 2**24, func
        return made


def test_no_mask_of_pairs_is_made():
    length = 2**16
    document = torch.arange(length) // 1024

    def mask_mod(b, h, q_idx, kv_idx):
        return (document[q_idx] == document[kv_idx]) & (q_idx >= kv_idx)

    with NothingLarge():
        lazy = flex.create_block_mask(mask_mod, None, None, length, length, "cpu")
        assert lazy.kv_num_blocks.shape == (1, 1, 512)
    assert (int(lazy.kv_num_blocks[0, 0, 20]), int(lazy.full_kv_num_blocks[0, 0, 20])) == (1, 4)
    assert lazy.kv_indices[0, 0, 20, 0] == 20 and lazy.full_kv_indices[0, 0, 20, :4].tolist() == [16, 17, 18, 19]


def test_slices_and_moves():
    lazy = own_mask(causal_mask)
    assert lazy.to("cpu").mask_mod is causal_mask
    assert lazy._adjust(40, 40).shape == (B, H, 40, 40)
    # One block of queries of a longer sequence, as in decoding with a cache.
    offset = torch.tensor(32)
    wide = flex.create_block_mask(causal_mask, None, None, 64, 64, "cpu", 32)
    part = wide[:, :, 1]
    part.mask_mod = lambda b, h, q_idx, kv_idx: causal_mask(b, h, q_idx + offset, kv_idx)
    part.seq_lengths = (32, 64)
    q, k, v = inputs(n_q=64, n_k=64)
    whole = flex.flex_attention(q, k, v, None, wide)
    close(flex.flex_attention(q[:, :, 32:], k, v, None, part), whole[:, :, 32:])
    with pytest.raises(ag.SpecError, match="sliced BlockMask"):
        flex.flex_attention(q[:, :, 32:], k, v, None, _with_lengths(wide[:, :, 1], (32, 64)))


def _with_lengths(block_mask, lengths):
    block_mask.seq_lengths = lengths
    return block_mask


def test_another_mask_mod_holds_inside_the_blocks_of_the_first():
    q, k, v = inputs(n_q=64, n_k=64)
    lazy = flex.create_block_mask(causal_mask, None, None, 64, 64, "cpu", 16)
    lazy.mask_mod = lambda b, h, q_idx, kv_idx: kv_idx % 2 == 0
    blocks = of_blocks(torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(), 16, 64)[0, 0]
    below = of_blocks(torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(-1), 16, 64)[0, 0]
    close(
        flex.flex_attention(q, k, v, None, lazy),
        dense(q, k, v, lambda b, h, i, j: below[i, j] | (blocks[i, j] & (j % 2 == 0)), None),
    )


# -- the call ---------------------------------------------------------------------------------------------------------


def test_grouped_heads_scale_and_other_lengths():
    q, k, v = inputs(kv_heads=2, n_q=33, n_k=N)
    mask_mod = CASES["symmetric_window"]()[0]
    want, want_lse = torch_result(q, k, v, None, torch_mask(mask_mod, 33, N), scale=0.7, enable_gqa=True)
    options = dict(scale=0.7, enable_gqa=True)
    out, aux = flex.flex_attention(
        q, k, v, None, own_mask(mask_mod, 33, N), return_aux=flex.AuxRequest(lse=True), **options
    )
    close(out, want)
    close(aux.lse, want_lse)
    assert isinstance(aux, flex.AuxOutput) and aux.max_scores is None
    out, aux = flex.flex_attention(q, k, v, None, own_mask(mask_mod, 33, N), return_aux=flex.AuxRequest(), **options)
    assert aux == (None, None)


def test_h_is_the_query_head_and_keys_of_one_batch_serve_all():
    q, _, _ = inputs()
    _, k, v = inputs(batch=1, kv_heads=2)
    score_mod = CASES["odd_heads_doubled"]()[1]
    block_mask = torch_mask(causal_mask)
    want, _ = torch_result(q, k, v, score_mod, block_mask, enable_gqa=True)
    close(flex.flex_attention(q, k, v, score_mod, block_mask, enable_gqa=True), want)


def test_gradient_of_lse():
    q, k, v = (x.requires_grad_() for x in inputs())
    _, lse = flex.flex_attention(q, k, v, return_lse=True)
    got = torch.autograd.grad(lse.sum(), [q, k])
    expected = torch.autograd.grad((q @ k.transpose(-1, -2) / math.sqrt(D)).logsumexp(-1).sum(), [q, k])
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs)


def test_half_types():
    q, k, v = inputs(torch.bfloat16)
    seen = []

    def score_mod(score, b, h, q_idx, kv_idx):
        seen.append(score.dtype)
        return torch.tanh(score) * 2

    out, lse = flex.flex_attention(q, k, v, score_mod, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and seen == [torch.float32]
    close(out.double(), torch_result(q, k, v, score_mod)[0].double(), 1e-2)


def test_nothing_is_compiled_for_new_values():
    q, k, v = inputs()

    def attention(slope, width):
        def score_mod(score, b, h, q_idx, kv_idx):
            return score + slope[h] * (kv_idx - q_idx)

        def mask_mod(b, h, q_idx, kv_idx):
            return (q_idx - kv_idx).abs() < width

        got = flex.flex_attention(q, k, v, score_mod, own_mask(mask_mod))
        close(got, dense(q, k, v, mask_mod, score_mod))

    attention(randn(H), 20)
    flex.flex_attention(q, k, v, scale=0.5)
    made = _compiled.cache_info().misses
    slope = randn(H) * 2
    attention(slope, 20)
    slope.mul_(0.5)
    attention(slope, 20)
    flex.flex_attention(q, k, v, scale=0.6)
    assert _compiled.cache_info().misses == made
    attention(slope, 21)  # a number of Python's is a constant of the kernel
    assert _compiled.cache_info().misses == made + 1


def test_what_is_in_place():
    q, k, v = inputs()

    def score_mod(score, b, h, q_idx, kv_idx):
        same = score
        score += kv_idx * 0.01
        score.mul_(0.5)
        return score + same

    def plain(score, b, h, q_idx, kv_idx):
        return (score + kv_idx * 0.01) * 0.5 * 2

    close(flex.flex_attention(q, k, v, score_mod), dense(q, k, v, None, plain))


def test_what_a_symbol_says_of_itself():
    q, k, v = inputs()

    def score_mod(score, b, h, q_idx, kv_idx):
        assert isinstance(score, torch.Tensor) and torch.is_tensor(q_idx)
        assert score.device == q.device and q_idx.device == q.device
        assert score.dtype == torch.float64 and q_idx.dtype == torch.int32 and (q_idx >= kv_idx).dtype == torch.bool
        assert score.shape == () and score.dim() == 0 and score.is_floating_point()
        return score

    close(flex.flex_attention(q, k, v, score_mod), flex.flex_attention(q, k, v))


def test_minus_infinity_in_a_captured_bias():
    q, k, v = inputs()
    bias = torch.where(randn(N, N) > -0.3, randn(N, N), -torch.inf)
    bias[7] = -torch.inf

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[q_idx, kv_idx]

    want, want_lse = torch_result(q, k, v, score_mod)
    out, lse = flex.flex_attention(q, k, v, score_mod, return_lse=True)
    close(out, want)
    close(lse, want_lse)


def test_from_flex():
    _, score_mod, learned = CASES["gated_bias"]()
    q, k, v = inputs()
    spec, captures = ag.from_flex(causal_mask, score_mod)
    assert list(captures.values()) == [learned["gate"], learned["bias"]]
    assert spec == ag.Spec(
        mask=ag.causal(),
        score=lambda s, b, h, i, j: s + ag.sigmoid(ag.Tensor("t0", 1)[h]) * ag.Tensor("t1", 1)[j],
    )
    close(
        ag.compile(spec)(q, k, v, scale=0.5, **captures),
        torch_result(q, k, v, score_mod, torch_mask(causal_mask), scale=0.5)[0],
    )


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["documents_with_local_positions", "methods", "gated_bias", "bias_by_clamped_distance", "causal_as_score"]
)
def test_in_a_compiled_graph(name, fresh_dynamo):
    mask_mod, score_mod, learned = CASES[name]()

    def attention(q, k, v):
        return flex.flex_attention(q, k, v, score_mod, own_mask(mask_mod), return_aux=flex.AuxRequest(lse=True))

    q, k, v = (x.requires_grad_() for x in inputs())
    leaves = [q, k, v, *learned.values()]
    results = []
    for function in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        out, aux = function(q, k, v)
        results.append([out, aux.lse, *torch.autograd.grad(out.square().sum() + aux.lse.sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        close(theirs, mine)


def test_functions_made_inside_a_compiled_graph(fresh_dynamo):
    def attention(q, k, v, bias, width):
        length = q.shape[2]

        def score_mod(score, b, h, q_idx, kv_idx):
            return score * (q_idx + 1) / length + bias[h]

        def mask_mod(b, h, q_idx, kv_idx):
            return (q_idx >= kv_idx) & (q_idx - kv_idx != width)

        return flex.flex_attention(
            q, k, v, score_mod, flex.create_block_mask(mask_mod, None, None, length, length, "cpu")
        )

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    bias = randn(H)
    for length, width in ((N, 3), (N - 5, 4), (N - 9, 6)):  # from the second on Dynamo keeps both symbolic
        q, k, v = inputs(n_q=length, n_k=length)
        close(compiled(q, k, v, bias, width), attention(q, k, v, bias, width))


def test_lists_in_a_compiled_graph(fresh_dynamo):
    live, (q, k, v) = random_blocks(), inputs(n_q=64, n_k=64)
    block_mask = torchs.BlockMask.from_kv_blocks(*block_lists(live), *block_lists(~live), 16, causal_mask)
    compiled = torch.compile(flex.flex_attention, fullgraph=True, backend="aot_eager")
    close(compiled(q, k, v, None, block_mask), flex.flex_attention(q, k, v, None, block_mask))


def test_a_graph_says_why_it_has_to_break(fresh_dynamo):
    for score_mod, why in ((unknown_method, "cumsum has no counterpart"), (exponential_of_infinity, "minus infinity")):
        compiled = torch.compile(flex.flex_attention, fullgraph=True, backend="aot_eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match=why):
            compiled(*inputs(), score_mod)
        with pytest.raises(ag.SpecError, match=why) as caught:
            torch.compile(flex.flex_attention, backend="aot_eager")(*inputs(), score_mod)
        assert "# here" in caught.value.text


# -- what is refused --------------------------------------------------------------------------------------------------

table = torch.arange(N, dtype=torch.float64)


def branch(score, b, h, q_idx, kv_idx):
    if q_idx >= kv_idx:  # here
        return score
    return score * 2


def conjunction(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx > 3 and kv_idx > 3, score, 0.0)  # here


def python_minimum(score, b, h, q_idx, kv_idx):
    return score + min(q_idx, kv_idx)  # here


def item(score, b, h, q_idx, kv_idx):
    return score + table[q_idx].item()  # here


def item_of_captured(score, b, h, q_idx, kv_idx):
    return score + table[3].item()  # here


def branch_on_captured(score, b, h, q_idx, kv_idx):
    return score if table[3] > 2 else -score  # here


def python_float(score, b, h, q_idx, kv_idx):
    return math.exp(score)  # here


def reduction(score, b, h, q_idx, kv_idx):
    return score.sum()  # here


def maximum_of_one(score, b, h, q_idx, kv_idx):
    return torch.max(score)  # here


def reduction_of_rows(score, b, h, q_idx, kv_idx):
    square = table.view(8, 9)
    return score + square[h].sum()  # here


def arithmetic_of_rows(score, b, h, q_idx, kv_idx):
    square = table.view(8, 9)
    return score + (square[h] * 2)[q_idx]  # here


def cut(score, b, h, q_idx, kv_idx):
    return score + table[q_idx : q_idx + 2]  # here


def not_indexed(score, b, h, q_idx, kv_idx):
    return score + table  # here


def float_index(score, b, h, q_idx, kv_idx):
    return score + table[score]  # here


def unknown_function(score, b, h, q_idx, kv_idx):
    return torch.lgamma(score)  # here


def unknown_method(score, b, h, q_idx, kv_idx):
    return score.cumsum(0)  # here


def several_values(score, b, h, q_idx, kv_idx):
    return score + torch.stack([q_idx, kv_idx])[0]  # here


def exponential_of_infinity(score, b, h, q_idx, kv_idx):
    score = torch.where(q_idx >= kv_idx, score, -float("inf"))
    return torch.exp(score)  # here


def plus_infinity(score, b, h, q_idx, kv_idx):
    return score + float("inf")  # here


def other_objects(score, b, h, q_idx, kv_idx):
    return score * 1j  # here


number = torch.tensor(2.0)


def changed_capture(score, b, h, q_idx, kv_idx):
    number.mul_(score)  # here
    return number


def random_number(score, b, h, q_idx, kv_idx):
    return score + torch.randn(())  # here


def narrow_integer(score, b, h, q_idx, kv_idx):
    return score + q_idx.to(torch.uint8)  # here


five = torch.zeros(B, H, 1, 1, 1)


def five_dimensions(score, b, h, q_idx, kv_idx):
    return score + five[b, h, 0, 0, 0]  # here


REFUSED = [
    (changed_capture, r"changes a captured tensor \(mul\)"),
    (random_number, "randn draws one number for all pairs"),
    (narrow_integer, "conversion to torch.uint8"),
    (five_dimensions, "a captured tensor of 5 dimensions"),
    (branch, "branches on a value"),
    (conjunction, "branches on a value"),
    (python_minimum, "branches on a value"),
    (item, "a Python number of a value"),
    (item_of_captured, "a Python value out of a captured tensor"),
    (branch_on_captured, "a Python value out of a captured tensor"),
    (python_float, "a Python number of a value"),
    (reduction, "sum has no counterpart"),
    (maximum_of_one, "max of one value is a reduction"),
    (reduction_of_rows, "sum of rows of a captured tensor"),
    (arithmetic_of_rows, "mul of rows of a captured tensor"),
    (cut, "indexed by single positions"),
    (not_indexed, "a captured tensor of shape"),
    (float_index, "indexed by integers"),
    (unknown_function, "lgamma has no counterpart"),
    (unknown_method, "cumsum has no counterpart"),
    (several_values, "stack has no counterpart"),
    (exponential_of_infinity, "exp of a score of minus infinity"),
    (plus_infinity, "a constant is finite"),
    (other_objects, "got complex"),
]


@pytest.mark.parametrize(("score_mod", "why"), REFUSED, ids=[mod.__name__ for mod, _ in REFUSED])
def test_refused_with_the_line(score_mod, why):
    for call in (lambda: flex.flex_attention(*inputs(), score_mod), lambda: ag.from_flex(None, score_mod)):
        with pytest.raises(ag.SpecError, match=why) as caught:
            call()
        assert "# here" in caught.value.text
        assert f"test_flex.py:{_line(score_mod)}, in {score_mod.__name__}" in str(caught.value)


def _line(function):
    lines, first = inspect.getsourcelines(function)
    return first + ["# here" in line for line in lines].index(True)


def test_a_mask_that_is_a_number_is_refused():
    def mask_mod(b, h, q_idx, kv_idx):
        return q_idx - kv_idx

    with pytest.raises(ag.SpecError, match="mask_mod returns a number"):
        flex.flex_attention(*inputs(), None, own_mask(mask_mod))


@pytest.mark.parametrize("result", [None, "score", [1.0]])
def test_a_mod_that_returns_no_number_is_refused(result):
    with pytest.raises(ag.SpecError, match=f"score_mod returns {type(result).__name__}"):
        flex.flex_attention(*inputs(), lambda score, b, h, q_idx, kv_idx: result)


def test_an_index_out_of_range_is_refused():
    """Below 0 as well, where torch would count from the end."""
    with pytest.raises(ag.InputError, match="t0: expected `i - j`"):
        flex.flex_attention(*inputs(), lambda score, b, h, q_idx, kv_idx: score + table[q_idx - kv_idx])
    causal_only = own_mask(causal_mask)
    flex.flex_attention(*inputs(), lambda score, b, h, q_idx, kv_idx: score + table[q_idx - kv_idx], causal_only)


def test_fallback_says_so_once():
    q, k, v = inputs()

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + torch.lgamma(kv_idx + 1.0)

    with pytest.warns(ag.AttngenWarning, match="lgamma has no counterpart"):
        out = flex.flex_attention(q, k, v, score_mod, own_mask(causal_mask), fallback="torch")
    close(out, torch_result(q, k, v, score_mod, torch_mask(causal_mask))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ag.AttngenWarning)
        flex.flex_attention(q, k, v, score_mod, own_mask(causal_mask), fallback="torch")


def test_fallback_of_a_mask():
    q, k, v = inputs()

    def mask_mod(b, h, q_idx, kv_idx):
        return torch.lgamma(q_idx + 1.0) >= torch.lgamma(kv_idx + 1.0)

    with pytest.warns(ag.AttngenWarning) as said:
        out = flex.flex_attention(q, k, v, None, own_mask(mask_mod), fallback="torch")
    assert sorted(str(w.message).split(":")[0] for w in said if w.category is ag.AttngenWarning) == [
        "create_block_mask computes the mask of all pairs, with torch",
        "flex_attention",
    ]
    close(out, torch_result(q, k, v, None, torch_mask(mask_mod))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(query=torch.zeros(2, 3)),
            r"query: expected a tensor \[batch, heads, length, head dim\], got shape \[2, 3\]",
        ),
        (dict(key=None), "key: expected a tensor"),
        (
            dict(key=torch.zeros(B, 2, N, D), value=torch.zeros(B, 2, N, D)),
            "key: expected 4 heads like query.*enable_gqa=True",
        ),
        (dict(key=torch.zeros(B, H, N, 8, dtype=torch.float64)), "k: expected head dim 16 like q"),
        (dict(block_mask="causal"), "block_mask: expected a BlockMask, got str"),
        (dict(block_mask=own_mask(causal_mask, 40, 40)), r"block_mask: expected one for lengths \(72, 72\)"),
        (dict(return_lse=True, return_aux=flex.AuxRequest(lse=True)), "return_lse: expected False next to return_aux"),
        (dict(return_aux=flex.AuxRequest(max_scores=True)), "return_aux: .*max_scores"),
        (dict(scale=0.0), "scale: expected .* above 0"),
        (dict(fallback="eager"), "fallback: expected None or \"torch\", got 'eager'"),
        (dict(backend="cuda"), "backend: expected one of"),
    ],
)
def test_bad_calls(change, message):
    arguments = dict(zip(("query", "key", "value"), inputs(), strict=True)) | change
    with pytest.raises(ag.InputError, match=message):
        flex.flex_attention(**arguments)


def test_bad_block_masks():
    q, k, v = inputs(n_q=64, n_k=64)
    with pytest.raises(ag.InputError, match="blocks that are multiples of 16"):
        flex.flex_attention(
            q, k, v, None, flex.BlockMask.from_kv_blocks(*block_lists(random_blocks(blocks=8)), BLOCK_SIZE=8)
        )
    with pytest.raises(ag.InputError, match="mask_mod: expected a function"):
        flex.create_block_mask(None, None, None, N, N)
    with pytest.raises(ag.InputError, match="compute_dq_write_order"):
        flex.create_block_mask(causal_mask, None, None, N, N, compute_dq_write_order=True)


# -- kernel_options ---------------------------------------------------------------------------------------------------


def test_kernel_options_are_a_schedule():
    options = dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, fwd_num_stages=3, bwd_num_warps=4, BACKEND="TRITON")
    options |= dict(bwd_BLOCK_M1=32, bwd_BLOCK_N1=64, BLOCK_M2=128, BLOCK_N2=16, bwd_USE_TMA=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = schedule_of(options.items())
    assert got == ag.Schedule(
        forward=ag.Tile(block_m=64, block_n=32, num_warps=8, num_stages=3),
        dq=ag.Tile(block_m=128, block_n=16, num_warps=4, tma=True),
        dkv=ag.Tile(block_m=32, block_n=64, num_warps=4, tma=True),
    )


def test_options_without_a_meaning_are_named():
    q, k, v = inputs()
    with pytest.warns(ag.AttngenWarning, match="kernel_options: PRESCALE_QK has no meaning"):
        flex.flex_attention(q, k, v, kernel_options={"PRESCALE_QK": True})
    with pytest.raises(ag.ScheduleError, match="block_m"):
        flex.flex_attention(q, k, v, kernel_options={"BLOCK_M": 7})


def test_the_same_names_as_torchs():
    assert set(flex.__all__) == set(torchs.__all__)
