"""Tiny random models of transformers, each with what is peculiar about its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 61
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODER = dict(**SIZES, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=None)
DECODER["tie_word_embeddings"] = False  # or the next token would be the last one again
_WINDOW = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))


def mistral() -> Any:
    """A window in every layer: caches that slide."""
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=5))


def gemma2() -> Any:
    """Soft-capped scores, a scale of its own, windows in turn."""
    config = hf.Gemma2Config(**DECODER, **_WINDOW, head_dim=16, query_pre_attn_scalar=7, attn_logit_softcapping=2.0)
    return hf.Gemma2ForCausalLM(config)


def gemma3() -> Any:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, **_WINDOW, head_dim=16))


def gpt_oss() -> Any:
    """A learned sink in each head."""
    config = hf.GptOssConfig(**DECODER, **_WINDOW, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    model = hf.GptOssForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.randn(4))
    return model


def qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=16))


def t5() -> Any:
    """An encoder, a decoder and attention between them; learned biases of positions, and no scale."""
    sizes = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4)
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)
    )


def bert() -> Any:
    """Every token sees every other."""
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES, max_position_embeddings=128, pad_token_id=0))


DECODERS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (llama, mistral, gemma2, gemma3, gpt_oss, qwen3)}
MODELS: dict[str, Callable[[], Any]] = {**DECODERS, "t5": t5, "bert": bert}


def tiny(name: str) -> Any:
    """The model of this name, always the same."""
    return randomised(MODELS[name])


def randomised(make: Callable[[], Any]) -> Any:
    """A model with no dropout at work, whose weights are as large as those of a trained one: with the library's own every token would
    look like every other.
    """
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 3):
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """int64 [batch, length], none of them the padding token."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str, batch: int = 2, length: int = 12, by: int = 4) -> torch.Tensor:
    """int64 [batch, length]: 0 for padding, which the last row has on this side."""
    mask = torch.ones(batch, length, dtype=torch.long)
    rows = slice(None, by) if side == "left" else slice(length - by, None)
    mask[-1, rows] = 0
    return mask
