"""Models of transformers with attngen: the same logits, gradients and tokens as with the library's own eager attention."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import masking_utils as theirs

from attngen.errors import InputError, SpecError
from attngen.integrations.transformers import register
from attngen.integrations.transformers.attention import attention_function
from attngen.integrations.transformers.masks import Mask, make_mask
from tests.integrations.transformers_cases import DECODERS, MODELS, padding, tiny, tokens

LOGITS, GRADIENTS = 1e-5, 1e-4  # of the oracle's float32, against a float32 that is as far off itself


@pytest.fixture(autouse=True)
def registered():
    register()


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())


def inputs_of(name: str, **named: Any) -> dict[str, Any]:
    given = {"input_ids": tokens(), **named}
    return {**given, "decoder_input_ids": tokens(seed=2)} if name == "t5" else given


def logits(model: Any, implementation: str, inputs: dict[str, Any]) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model(**inputs).logits


def gradients(model: Any, implementation: str, inputs: dict[str, Any], real: torch.Tensor) -> torch.Tensor:
    """All gradients behind one another, of a loss that leaves out what padding gives."""
    model.zero_grad()
    out = logits(model, implementation, inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (out * weight)[real].sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, side):
    model = tiny(name)
    inputs = inputs_of(name) if side == "none" else inputs_of(name, attention_mask=padding(side))
    # What padding attends to is nobody's business: eager gives it a mean of all values, attngen 0. T5 pads its encoder alone.
    real = torch.ones(2, 12).bool() if side == "none" or name == "t5" else padding(side).bool()
    want, got = (logits(model, implementation, inputs)[real] for implementation in ("eager", "attngen"))
    assert distance(got, want) < LOGITS
    want, got = (gradients(model, implementation, inputs, real) for implementation in ("eager", "attngen"))
    assert distance(got, want) < GRADIENTS


@pytest.mark.parametrize("name", DECODERS)
def test_packed_sequences_do_not_see_each_other(name):
    model, positions = (
        tiny(name),
        torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2]]),
    )
    inputs = {"input_ids": tokens(), "position_ids": positions, "use_cache": False}
    want, got = (logits(model, implementation, inputs) for implementation in ("eager", "attngen"))
    assert distance(got, want) < LOGITS
    if name != "gpt_oss":  # which does not tell its masks of position_ids, so that eager mixes them as well
        alone = model(input_ids=tokens()[:1, 4:]).logits
        assert distance(got[:1, 4:], alone) < LOGITS
    want, got = (
        gradients(model, implementation, inputs, torch.ones(2, 12).bool()) for implementation in ("eager", "attngen")
    )
    assert distance(got, want) < GRADIENTS


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
}


def generated(model: Any, implementation: str, **named: Any) -> list[list[int]]:
    model.set_attn_implementation(implementation)
    torch.manual_seed(7)
    options = {"attention_mask": padding("left"), "max_new_tokens": 14, "do_sample": False, **named}
    return model.generate(tokens(), **options).tolist()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_generated_tokens(name, cache):
    """Of windows of 5 tokens: the caches slide from the first token on."""
    model = tiny(name)
    assert generated(model, "attngen", **CACHES[cache]) == generated(model, "eager", **CACHES[cache])


def test_chunks_of_a_long_prompt():
    """A second prompt behind a cache that is there already: several queries whose keys slide."""
    for name in ("llama", "gemma3"):
        model, found = tiny(name), {}
        for implementation in ("eager", "attngen"):
            model.set_attn_implementation(implementation)
            cache = hf.DynamicCache(config=model.config)
            parts = [model(input_ids=part, cache=cache).logits for part in tokens(length=30).split([9, 1, 13, 7], 1)]
            found[implementation] = torch.cat(parts, 1)
        assert distance(found["attngen"], found["eager"]) < LOGITS


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_all_pairs(kind):
    """A 4-D mask is what the user says, and nothing else."""
    model = tiny("llama")
    keep = (torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(3)) < 0.6) | torch.eye(12).bool()
    mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    bias = mask + torch.randn(12, 12, generator=torch.Generator().manual_seed(4))
    want = logits(model, "eager", {"input_ids": tokens(), "attention_mask": mask if kind == "bool" else bias})
    got = logits(model, "attngen", {"input_ids": tokens(), "attention_mask": keep if kind == "bool" else bias})
    assert distance(got, want) < LOGITS


# -- masks ------------------------------------------------------------------------------------------------------------


def _groups(length: int) -> torch.Tensor:
    groups = torch.full((2, length), -1)
    groups[0, 3:7], groups[1, 2:4], groups[1, 8:] = 0, 0, 1
    return groups


def _packed(length: int) -> torch.Tensor:
    return (torch.arange(length)[None] // torch.tensor([[5], [3]])).contiguous()


FUNCTIONS = {
    "causal": lambda n: theirs.causal_mask_function,
    "all": lambda n: theirs.bidirectional_mask_function,
    "window": lambda n: theirs.sliding_window_causal_mask_function(4),
    "window of both sides": lambda n: theirs.sliding_window_bidirectional_mask_function(3),
    "chunks": lambda n: theirs.chunked_causal_mask_function(4, torch.tensor([0, 3])),
    "groups": lambda n: theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(_groups(n))),
    "packed": lambda n: theirs.and_masks(
        theirs.remap_positions_for_packed_sequence(
            theirs.sliding_window_causal_mask_function(3), _packed(n) * 0 + torch.arange(n)
        ),
        theirs.packed_sequence_mask_function(_packed(n)),
    ),
    "a user's": lambda n: theirs.or_masks(
        theirs.causal_mask_function, lambda b, h, q, k: torch.where(q % 3 == 0, k < 4, False)
    ),
}
SIZES = {  # queries, keys, their offsets: a prompt, a step, a chunk, and caches that slide
    "prompt": (12, 12, 0, 0),
    "step": (1, 12, 11, 0),
    "chunk": (5, 12, 7, 0),
    "slid step": (1, 7, 12, 6),
    "slid chunk": (4, 9, 9, 4),
    "static": (3, 16, 4, 0),
}
PADDED = {
    "none": None,
    "no": lambda n: torch.ones(2, n).bool(),
    "left": lambda n: torch.arange(n) >= torch.tensor([[0], [4]]),
    "right": lambda n: torch.arange(n) < torch.tensor([[n], [n - 4]]),
    "holes": lambda n: torch.arange(n) % torch.tensor([[3], [4]]) > 0,
    "all of a row": lambda n: torch.arange(n) * 0 >= torch.tensor([[0], [1]]),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_are_those_of_the_library(function, size):
    """Against the library's mask of all pairs, in attention, and as the BlockMask that it also is."""
    (n_q, n_k, q_offset, kv_offset), attend = SIZES[size], attention_function("auto", frozenset())
    mask_function = FUNCTIONS[function](max(q_offset + n_q, kv_offset + n_k))
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(2, 2, n, 16, generator=generator) for n in (n_q, n_k, n_k))
    for name, padded in PADDED.items():
        seen = q_offset + n_q  # of a static cache the rest is not written
        named = dict(batch_size=2, q_length=n_q, kv_length=n_k, q_offset=q_offset, kv_offset=kv_offset)
        named |= dict(mask_function=mask_function, attention_mask=padded and padded(seen))
        for moving in (None, 4):  # the shift as part of the spec, whether it is 0 or not
            mask = make_mask(**named, local_size=moving)
            keep = theirs.sdpa_mask(**named, allow_is_causal_skip=False)
            score = (q @ k.mT / 4).masked_fill(~keep, -torch.inf)
            empty = ~keep.any(-1, keepdim=True)
            want = torch.where(empty, 0, torch.where(empty, 0, score).softmax(-1)) @ v
            got, _ = attend(torch.nn.Module(), q, k, v, mask)
            assert distance(got.transpose(1, 2), want) < LOGITS, (name, moving)
        assert tuple(mask.shape) == (2, 1, n_q, n_k)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_checkpointing_gives_the_same_gradients(name):
    """With dropout at work: what is computed again draws the same numbers."""
    model, found = tiny(name).train(), []
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    inputs, real = inputs_of(name, attention_mask=padding("left")), torch.ones(2, 12).bool()
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable()
        torch.manual_seed(11)
        found.append(gradients(model, "attngen", inputs, real))
    assert distance(found[1], found[0]) < 1e-6
    torch.manual_seed(12)
    assert distance(gradients(model, "attngen", inputs, real), found[0]) > 1e-2


def test_dropout_drops_weights_and_keeps_their_mean():
    attend, torch_module, n = attention_function("auto", frozenset()), torch.nn.Module(), 64
    q, k, v = torch.randn(2, 4, n, 16), torch.randn(2, 4, n, 16), torch.eye(n).expand(2, 4, n, n)
    whole, _ = attend(torch_module, q, k, v, None, is_causal=False)
    dropped, _ = attend(torch_module, q, k, v, None, is_causal=False, dropout=0.25)
    share = (dropped == 0).float().mean()
    assert abs(share - 0.25) < 0.02
    assert torch.allclose(dropped[dropped != 0] * 0.75, whole[dropped != 0], rtol=1e-5)


def test_a_module_that_does_not_train_drops_nothing():
    attend, (q, k, v) = attention_function("auto", frozenset()), (torch.randn(2, 4, 9, 16) for _ in range(3))
    dropped, _ = attend(torch.nn.Module().eval(), q, k, v, None, dropout=0.5)
    assert torch.equal(dropped, attend(torch.nn.Module(), q, k, v, None)[0])


def test_sinks_of_each_query():
    attend, module, (q, k, v) = attention_function("auto", frozenset()), torch.nn.Module(), torch.randn(3, 2, 4, 9, 16)
    sinks = torch.randn(2, 4, 9, 1, requires_grad=True)
    logits = (q @ k.mT / 4).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    want = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ v
    got, _ = attend(module, q, k, v, None, sinks=sinks)
    assert distance(got.transpose(1, 2), want) < LOGITS
    weight = torch.randn(2, 4, 9, 16)
    (wanted,) = torch.autograd.grad((want * weight).sum(), sinks)
    (found,) = torch.autograd.grad((got.transpose(1, 2) * weight).sum(), sinks)
    assert distance(found, wanted) < GRADIENTS


def test_eval_drops_nothing():
    model = tiny("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
    assert torch.equal(logits(model, "attngen", inputs_of("llama")), logits(model, "attngen", inputs_of("llama")))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_weights_that_are_asked_for():
    for name in ("llama", "bert", "gpt_oss"):
        with pytest.raises(InputError, match=r'output_attentions.*set_attn_implementation\("eager"\)'):
            logits(tiny(name), "attngen", inputs_of(name, output_attentions=True))
    model = tiny("llama")
    model.set_attn_implementation("attngen")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_an_argument_that_nobody_knows():
    model = tiny("llama")
    with pytest.raises(InputError, match=r"indices: .*eager.*ignore=\[\"indices\"\]"):
        logits(model, "attngen", inputs_of("llama", indices=torch.zeros(1)))
    register("attngen_lax", ignore=["indices"])
    assert logits(model, "attngen_lax", inputs_of("llama", indices=torch.zeros(1))).shape == (2, 12, 61)


def test_a_mask_function_that_branches():
    config = tiny("llama").config
    config._attn_implementation = "attngen"

    def image(b, h, q_idx, kv_idx):
        return q_idx >= 0 if kv_idx > 3 else q_idx < 0

    with pytest.raises(SpecError, match=r"(?s)test_transformers.py.*branches.*sdpa"):
        theirs.create_causal_mask(config, torch.zeros(2, 12, 32), None, None, or_mask_function=image)


def test_a_mask_function_of_what_the_language_lacks():
    with pytest.raises(SpecError, match=r"(?s)test_transformers.py.*lgamma"):
        make_mask(1, 4, 4, mask_function=lambda b, h, q, k: torch.lgamma(q) > k)


def test_a_model_that_computes_with_its_mask():
    mask = make_mask(2, 12, 12, attention_mask=padding("left").bool())
    assert mask[:, :, :, :12] is mask and isinstance(mask.to("cpu"), Mask)
    for use in (
        lambda: mask + 1,
        lambda: 1.0 - mask,
        lambda: mask[:, :, -1:],
        lambda: mask[:, :, :, :5],
        lambda: ~mask,
    ):
        with pytest.raises(InputError, match=r'attention_mask.*computes with its mask.*"sdpa" or "eager"'):
            use()
    assert mask.ndim == mask.dim() == 4 and len(mask.shape) == 4
    with pytest.raises(InputError, match=r"attention_mask.*conversion to torch.bool"):
        mask.to(torch.bool)
    with pytest.raises(AttributeError, match=r"dtype.*computes with its mask"):
        mask.dtype  # noqa: B018
    with pytest.raises(TypeError, match="Mask"):
        torch.where(mask, 0.0, 1.0)


def test_masks_that_do_not_fit():
    attend, module = attention_function("auto", frozenset()), torch.nn.Module()
    q, k = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 8, 16)
    for mask in (
        make_mask(2, 3, 9, q_offset=5),
        torch.ones(2, 8).bool(),
        torch.ones(2, 1, 3, 9).bool(),
        torch.ones(2, 1, 3, 8).int(),
    ):
        with pytest.raises(InputError, match="attention_mask"):
            attend(module, q, k, k, mask)
    with pytest.raises(InputError, match=r"attention_mask: expected a mask for a causal layer with a cache"):
        attend(module, q, k, k, None)
    with pytest.raises(InputError, match="FlexAttention"):
        attend(
            module,
            q,
            k,
            k,
            torch.nn.attention.flex_attention.create_block_mask(theirs.causal_mask_function, None, None, 3, 8, "cpu"),
        )
    with pytest.raises(InputError, match="position_bias"):
        attend(module, q, k, k, None, is_causal=False, position_bias=torch.zeros(1, 2, 3, 9))


def test_packed_sequences_that_a_mask_has_lost():
    """With a cache the library does not look for packed sequences in position_ids."""
    model, ends = tiny("llama"), torch.tensor([0, 5, 12], dtype=torch.int32)
    named = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=7, max_length_k=7)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    inputs = {"input_ids": tokens(1), "position_ids": positions, **named}
    for mask in (None, torch.ones(1, 12), padding("left", 1)):
        with pytest.raises(InputError, match=r"cu_seq_lens_q.*use_cache=False"):
            logits(model, "attngen", {**inputs, "attention_mask": mask})
    got, want = (logits(model, x, {**inputs, "use_cache": False}) for x in ("attngen", "eager"))
    assert distance(got, want) < LOGITS


def test_layers_without_a_mask():
    """As with SDPA: causal, unless the module or the call says otherwise, and within the window that comes along."""
    attend, module = attention_function("auto", frozenset()), torch.nn.Module()
    q, k, v = (torch.randn(2, 2, 9, 16) for _ in range(3))
    for window in (None, 4):
        keep = theirs.sdpa_mask(
            2, 9, 9, mask_function=theirs.sliding_window_causal_mask_function(window or 99), local_size=1
        )
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, keep)
        assert distance(attend(module, q, k, v, None, sliding_window=window)[0].transpose(1, 2), want) < LOGITS
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert distance(attend(module, q, k, v, None, is_causal=False)[0].transpose(1, 2), want) < LOGITS


def test_one_query_without_a_mask_stands_at_the_last_key():
    attend, module = attention_function("auto", frozenset()), torch.nn.Module()
    q, k, v = (torch.randn(2, 2, n, 16) for n in (1, 9, 9))
    for window in (None, 4):
        last = slice(None) if window is None else slice(9 - window, None)
        want = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, last], v[:, :, last])
        assert distance(attend(module, q, k, v, None, sliding_window=window)[0].transpose(1, 2), want) < LOGITS


def test_a_part_of_a_mask_that_nobody_knows():
    with pytest.raises(InputError, match=r"tree_ids: .*sdpa"):
        make_mask(1, 4, 4, tree_ids=torch.zeros(4))


@pytest.mark.parametrize("name", ["my_flash", "sdpa2", "paged|attngen", "someone/attngen", ""])
def test_names_that_mean_something_to_transformers(name):
    with pytest.raises(InputError, match="name"):
        register(name)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r'transformers: .*pip install "transformers>='):
        register()


def test_an_old_transformers(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(InputError, match=r"transformers: expected version .* or later, got 4.57.1; pip install"):
        register()


def test_attngen_alone_does_not_load_transformers():
    code = "import sys, attngen, attngen.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_continuous_batching():
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, prompts = tiny("gemma2"), [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3]]
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.set_attn_implementation("attngen")
    pages = ContinuousBatchingConfig(num_blocks=32, block_size=16, max_batch_tokens=32)
    found = model.generate_batch(prompts, greedy, continuous_batching_config=pages, progress_bar=False)
    model.set_attn_implementation("eager")
    for prompt, (_, got) in zip(prompts, sorted(found.items()), strict=True):
        want = model.generate(torch.tensor([prompt]), generation_config=greedy)[0, len(prompt) :]
        assert got.generated_tokens == want.tolist()
