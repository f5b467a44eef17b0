"""What is made ready ahead of time for a model is what its calls ask for: the same specs at the same sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attngen.integrations.config import workloads

hf = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # the name that old versions know too

BATCH, CONTEXT = 2, 12
SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DECODER = dict(**SIZES, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None)
WINDOW = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
CHUNKS = dict(attention_chunk_size=5, layer_types=["chunked_attention", "full_attention"], intermediate_size_mlp=48)
MODELS = {
    "llama": lambda: hf.LlamaConfig(**DECODER),
    "mistral": lambda: hf.MistralConfig(**DECODER, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**DECODER, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**DECODER, **WINDOW, head_dim=16),
    "gemma3": lambda: hf.Gemma3TextConfig(**DECODER, **WINDOW, head_dim=16),
    "gpt_oss": lambda: hf.GptOssConfig(**DECODER, **WINDOW, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
    "llama4": lambda: hf.Llama4TextConfig(**DECODER | CHUNKS, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "modernbert": lambda: hf.ModernBertConfig(
        **SIZES, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0, reference_compile=False
    ),
    "bert": lambda: hf.BertConfig(**SIZES, max_position_embeddings=64),
}
ENCODERS = ("modernbert", "bert")
Call = tuple[str, str]  # the spec's text, the shape


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Call]]:
    """What attentions are asked for while models run."""
    from attngen.integrations.transformers import attention as calls
    from attngen.integrations.transformers import register

    seen: set[Call] = set()
    real = calls.attention_of

    def spied(form: Any, backend: str) -> Any:
        attn = real(form, backend)

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: Any) -> Any:
            shape = f"B{q.shape[0]} Hq{q.shape[1]} Hkv{k.shape[1]} Nq{q.shape[2]} Nk{k.shape[2]} D{q.shape[3]}"
            seen.add((attn.spec.text, shape))
            return attn(q, k, v, **others)

        return call

    monkeypatch.setattr(calls, "attention_of", spied)
    register()
    yield seen


def ahead(config: Any, **options: bool) -> set[Call]:
    """What a configuration says will be asked for: prefills of one token less than the context, and the decoding of its last."""
    found = set()
    for one in workloads(config.to_dict(), [BATCH], [CONTEXT], **options):
        shape = one.shape
        sizes = f"B{shape.batch} Hq{shape.heads_q} Hkv{shape.heads_kv} Nq{shape.n_q} Nk{shape.n_k} D{shape.head_dim}"
        found.add((one.spec.text, sizes))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_calls_are_those_that_were_made_ready(name: str, asked: set[Call]):
    config = MODELS[name]()
    config._attn_implementation = "attngen"
    tokens = torch.randint(1, 61, (BATCH, CONTEXT))
    with torch.no_grad():
        if name in ENCODERS:
            hf.AutoModel.from_config(config).eval()(input_ids=tokens)
        else:
            model = hf.AutoModelForCausalLM.from_config(config).eval()
            model(input_ids=tokens, use_cache=False)  # the whole context
            prefilled, prefill = set(asked), CONTEXT - 1
            cache = model(input_ids=tokens[:, :prefill], use_cache=True).past_key_values
            asked.clear()
            model(input_ids=tokens[:, prefill:], past_key_values=cache)  # its last token
            asked |= prefilled
    assert asked == ahead(config)


@pytest.mark.parametrize("name", MODELS)
def test_batches_with_padding_ask_for_more(name: str, asked: set[Call]):
    config = MODELS[name]()
    config._attn_implementation = "attngen"
    tokens, keep = torch.randint(1, 61, (BATCH, CONTEXT)), torch.ones(BATCH, CONTEXT, dtype=torch.int64)
    keep[0, :3] = 0
    with torch.no_grad():
        if name in ENCODERS:
            hf.AutoModel.from_config(config).eval()(input_ids=tokens, attention_mask=keep)
        else:
            hf.AutoModelForCausalLM.from_config(config).eval()(input_ids=tokens, attention_mask=keep, use_cache=False)
    assert asked and not asked & ahead(config) and asked <= ahead(config, padded=True)
