"""More models of transformers with attngen, for what each of them does differently, and the generated kernels under all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import masking_utils as theirs

from attngen.errors import InputError
from attngen.integrations.transformers import register
from attngen.integrations.transformers.attention import attention_function
from attngen.integrations.transformers.masks import make_mask
from tests.integrations.test_transformers import GRADIENTS, LOGITS, distance, gradients, inputs_of, logits
from tests.integrations.transformers_cases import DECODER, MODELS, SIZES, VOCABULARY, padding, randomised, tiny, tokens
from tests.pretend import pretending

IMAGE = 60  # the token that stands for a part of an image
_VISION = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
)
_WINDOWS = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])


def phi3() -> Any:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER, sliding_window=5))


def gpt_neox() -> Any:
    config = {**SIZES, "is_decoder": True, "tie_word_embeddings": False, "eos_token_id": None, "pad_token_id": 0}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**config, max_position_embeddings=128))


def gpt2() -> Any:
    """Asks its mask for its dimensions, and does not tell its layers that weights are wanted."""
    sizes = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, pad_token_id=0, eos_token_id=None, tie_word_embeddings=False))


def cohere2() -> Any:
    return hf.Cohere2ForCausalLM(hf.Cohere2Config(**DECODER, **_WINDOWS))


def llama4() -> Any:
    """Chunks, which begin behind each row's padding; scales that depend on the position."""
    layers = dict(attention_chunk_size=5, layer_types=["chunked_attention", "full_attention"])
    experts = dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48)
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**DECODER, **layers, **experts, head_dim=8))


def deepseek_v3() -> Any:
    """Values are narrower than keys."""
    heads = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16)
    config = {**DECODER, **heads, **experts, "v_head_dim": 8, "first_k_dense_replace": 1}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**config))


def gemma3_of_both_sides() -> Any:
    """An or_mask_function that says yes to everything."""
    config = hf.Gemma3TextConfig(**DECODER, **_WINDOWS, head_dim=16, use_bidirectional_attention=True)
    return hf.Gemma3ForCausalLM(config)


def bart() -> Any:
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
              (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    names = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None, forced_eos_token_id=None, decoder_start_token_id=1)
    config = hf.BartConfig(vocab_size=VOCABULARY, d_model=32, **layers, **names, max_position_embeddings=64)
    return hf.BartForConditionalGeneration(config)


def t5_gemma() -> Any:
    side = dict(**DECODER, **_WINDOWS, head_dim=8)
    config = hf.T5GemmaConfig(encoder=side, decoder={**side, "cross_attention_hidden_size": 32}, vocab_size=VOCABULARY)
    return hf.T5GemmaForConditionalGeneration(config)


def whisper() -> Any:
    """An encoder without a mask."""
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
              (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    names = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1)
    sizes = dict(vocab_size=VOCABULARY, d_model=32, max_source_positions=20, max_target_positions=40, num_mel_bins=8)
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **layers, **names))


def modern_bert() -> Any:
    """Windows of both sides."""
    names = dict(pad_token_id=0, cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2)
    config = hf.ModernBertConfig(**SIZES, **names, local_attention=6, global_attn_every_n_layers=2)
    return hf.ModernBertForMaskedLM(config)


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**_VISION))


def swin() -> Any:
    """A learned bias of positions, given as a mask of all pairs."""
    sizes = dict(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return hf.SwinForImageClassification(hf.SwinConfig(**sizes))


def gemma3_with_images() -> Any:
    """The tokens of an image see each other, whatever their order."""
    text = dict(**DECODER, **_WINDOWS, head_dim=16)
    places = dict(image_token_index=IMAGE, boi_token_index=59, eoi_token_index=58, mm_tokens_per_image=4)
    config = hf.Gemma3Config(text_config=text, vision_config=_VISION, **places)
    return hf.Gemma3ForConditionalGeneration(config)


def _text() -> dict[str, Any]:
    return {"input_ids": tokens(), "attention_mask": padding("left")}


def _pair() -> dict[str, Any]:
    return {**_text(), "decoder_input_ids": tokens(seed=2)}


def _sound() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}


def _image_in_text() -> dict[str, Any]:
    ids = tokens().clamp(max=57)
    ids[:, 5:9] = IMAGE
    return {"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "attention_mask": padding("left"), **_image()}


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    **{f.__name__: (f, _text) for f in (phi3, gpt_neox, gpt2, cohere2, llama4, deepseek_v3, gemma3_of_both_sides)},
    "modern_bert": (modern_bert, _text), "bart": (bart, _pair), "t5_gemma": (t5_gemma, _pair),
    "whisper": (whisper, lambda: {**_sound(), "decoder_input_ids": tokens(seed=2)}),
    "vit": (vit, _image), "swin": (swin, _image), "gemma3_with_images": (gemma3_with_images, _image_in_text),
}  # fmt: skip
GENERATING = [name for name in OTHERS if name not in ("modern_bert", "vit", "swin")]


@pytest.fixture(autouse=True)
def registered():
    register()


def other(name: str) -> tuple[Any, dict[str, Any]]:
    make, inputs = OTHERS[name]
    return randomised(make), inputs()


@pytest.mark.parametrize("name", OTHERS)
def test_logits_and_gradients(name):
    model, inputs = other(name)
    want, got = (logits(model, implementation, inputs) for implementation in ("eager", "attngen"))
    padded = "attention_mask" in inputs and "decoder_input_ids" not in inputs
    real = inputs["attention_mask"].bool() if padded else torch.ones(want.shape[:-1]).bool()
    assert distance(got[real], want[real]) < LOGITS
    want, got = (gradients(model, implementation, inputs, real) for implementation in ("eager", "attngen"))
    assert distance(got, want) < GRADIENTS


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["dynamic", "static"]
)
@pytest.mark.parametrize("name", GENERATING)
def test_generated_tokens(name, cache):
    model, inputs = other(name)
    inputs.pop("decoder_input_ids", None)
    found = []
    for implementation in ("eager", "attngen"):
        model.set_attn_implementation(implementation)
        found.append(model.generate(**inputs, max_new_tokens=10, do_sample=False, **cache).tolist())
    assert found[1] == found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_several_tokens_at_a_time(name):
    """Guesses that are checked together, and may be taken back; prompts in chunks."""
    model, assistant, found = tiny(name), tiny("llama"), {}
    guesses = ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}, {"prefill_chunk_size": 5})
    for implementation in ("eager", "attngen"):
        model.set_attn_implementation(implementation)
        assistant.set_attn_implementation(implementation)
        options = {"max_new_tokens": 15, "do_sample": False}
        found[implementation] = [model.generate(tokens(1), **options, **guess).tolist() for guess in guesses]
    assert found["attngen"] == found["eager"]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["none", "left", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_generated_kernels(name, side):
    """In Triton's interpreter, forward and backward."""
    register("attngen_interpreted", backend="interpret")
    model, keep = tiny(name), torch.ones(2, 12, dtype=torch.long) if side == "none" else padding("left")
    if side == "holes":
        keep[0, 3] = keep[1, 8] = 0
    inputs, real = inputs_of(name, attention_mask=keep), keep.bool() if name != "t5" else torch.ones(2, 12).bool()
    want, got = (logits(model, implementation, inputs)[real] for implementation in ("eager", "attngen_interpreted"))
    assert distance(got, want) < LOGITS
    want, got = (gradients(model, x, inputs, real) for x in ("eager", "attngen_interpreted"))
    assert distance(got, want) < GRADIENTS


@pytest.mark.slow
def test_generated_kernels_of_steps():
    """Caches that slide, an offset on the device, dropout."""
    register("attngen_interpreted", backend="interpret")
    for name in ("mistral", "llama4"):
        model = tiny(name) if name in MODELS else other(name)[0]
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
            found = []
            for implementation in ("eager", "attngen_interpreted"):
                model.set_attn_implementation(implementation)
                options = {"attention_mask": padding("left"), "max_new_tokens": 6, "do_sample": False, **cache}
                found.append(model.generate(tokens(), **options).tolist())
            assert found[1] == found[0]
    model = tiny("llama").train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    found = []
    for implementation in ("attngen", "attngen_interpreted"):  # one seed drops the same weights on every backend
        torch.manual_seed(4)
        found.append(gradients(model, implementation, inputs_of("llama"), torch.ones(2, 12).bool()))
    assert distance(found[1], found[0]) < GRADIENTS


@pytest.mark.slow
def test_everything_is_where_the_queries_are():
    """On a GPU that is a pretence: an operation that mixes tensors of two devices fails."""
    attend, module = attention_function("interpret", frozenset()), torch.nn.Module()

    def outputs(device: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator).to(device)

        q, k, v, rows = random(2, 4, 6, 16), random(2, 2, 9, 16), random(2, 2, 9, 16), torch.arange(12, device=device)
        left = torch.tensor([[0], [4]], device=device)
        window = theirs.sliding_window_causal_mask_function(4)
        chunks = theirs.chunked_causal_mask_function(4, left[:, 0])
        found = []
        for keep in (None, rows >= left, rows != left):
            for offset in (6, torch.tensor(6, device=device)):
                for function in (window, chunks):
                    mask = make_mask(2, 6, 9, offset, 3, function, keep, local_size=4, device=device)
                    found.append(attend(module, q, k, v, mask, s_aux=random(4), softcap=5.0)[0])
        found.append(attend(module, q, k, v, random(1, 1, 6, 9), position_bias=random(1, 4, 6, 9))[0])
        ends = {f"cu_seq_lens_{x}": torch.tensor(n, device=device) for x, n in (("q", [0, 2, 6]), ("k", [0, 4, 9]))}
        found.append(attend(module, q[:1], k[:1], v[:1], None, sliding_window=3, s_aux=random(4), **ends)[0])
        torch.manual_seed(0)
        found.append(attend(module, q, k, v, None, is_causal=False, dropout=0.3)[0])
        return [x.cpu() for x in found]

    want = outputs("cpu")
    with pretending():
        got = outputs("cuda")
    assert len(got) == 15 and all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_weights_that_a_model_does_not_ask_its_layers_for():
    model, inputs = other("gpt2")
    with pytest.raises(InputError, match=r'output_attentions.*set_attn_implementation\("eager"\)'):
        logits(model, "attngen", {**inputs, "output_attentions": True})
    assert len(model.eval()(**inputs, output_hidden_states=True).hidden_states) == 3


def test_models_that_take_their_masks_apart():
    """They are built with attngen's name, though they have attention of their own."""
    sizes = dict(vocab_size=VOCABULARY, n_layers=1, n_heads=4, pad_token_id=0)
    bloom = hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4, attn_implementation="attngen")
    mpt = hf.MptConfig(**sizes, d_model=32, max_seq_len=64, attn_implementation="attngen")
    for model in (hf.BloomForCausalLM(bloom), hf.MptForCausalLM(mpt)):
        with pytest.raises(InputError, match=r'attention_mask.*computes with its mask.*"sdpa" or "eager"'):
            model(input_ids=tokens())
