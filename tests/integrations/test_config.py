"""Models' configurations as attentions: what is read, that it is what transformers' own classes say, and what is refused."""

import json
from pathlib import Path

import pytest

import attngen as ag
from attngen.integrations.config import attentions, read_config, unread_parts, workloads
from attngen.integrations.families import FAMILIES, REFUSED
from attngen.integrations.layers import Layer

MODELS = Path(__file__).parents[2] / "examples" / "models"
SMALL = {"hidden_size": 512, "num_attention_heads": 32, "num_hidden_layers": 3}


def small(kind, **fields):
    return {"model_type": kind, **SMALL, **fields}


def test_the_example_models():
    llama, gemma, oss = (
        attentions(read_config(MODELS / name)) for name in ("llama3-8b.json", "gemma3-4b.json", "gpt-oss-20b.json")
    )
    assert [str(one) for one in llama] == ["causal: Hq32 Hkv8 D128, 32 layers"]
    assert [str(one) for one in gemma] == [
        "causal, window 1024: Hq8 Hkv4 D256, 29 layers",
        "causal: Hq8 Hkv4 D256, 5 layers",
    ]
    assert [str(one) for one in oss] == [
        "causal, window 128, sinks: Hq64 Hkv8 D64, 12 layers",
        "causal, sinks: Hq64 Hkv8 D64, 12 layers",
    ]
    assert gemma[0].layers[:7] == (0, 1, 2, 3, 4, 6, 7)


def test_the_calls_of_a_model():
    config = small("llama", num_key_value_heads=2, torch_dtype="float16")
    found = workloads(config, [1, 8], [128])
    assert [(str(one.shape), one.dtype, one.directions) for one in found] == [
        ("B1 Hq32 Hkv2 N128 D16", "float16", ("forward",)),
        ("B1 Hq32 Hkv2 Nq1 Nk128 D16", "float16", ("forward",)),
        ("B8 Hq32 Hkv2 N128 D16", "float16", ("forward",)),
        ("B8 Hq32 Hkv2 Nq1 Nk128 D16", "float16", ("forward",)),
    ]
    trained = workloads(config, [1], [128], dtype="bfloat16", training=True)
    assert [(one.dtype, one.directions) for one in trained] == [
        ("bfloat16", ("forward", "backward")),
        ("bfloat16", ("forward",)),
    ]
    assert len(workloads(small("bert"), [1], [128])) == 1, "an encoder decodes nothing"


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (small("llama"), [Layer()]),
        (small("mistral", sliding_window=None), [Layer()]),
        (small("mistral"), [Layer(window=4096)]),  # as transformers: left out is its default, not none
        (small("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=32), [Layer(), Layer(window=32)]),
        (small("qwen2", sliding_window=32, use_sliding_window=False), [Layer()]),
        (small("gemma2"), [Layer(window=4096, soft_cap=50.0), Layer(soft_cap=50.0)]),
        (small("gemma3_text", sliding_window_pattern=2, sliding_window=8), [Layer(window=8), Layer()]),
        (small("gemma3_text", use_bidirectional_attention=True, sliding_window=8, num_hidden_layers=1),
         [Layer(causal=False, window=5)]),
        (small("gpt_oss", sliding_window=8), [Layer(window=8, sinks=True), Layer(sinks=True)]),
        (small("llama4_text", attention_chunk_size=64, no_rope_layer_interval=2), [Layer(chunk=64), Layer()]),
        (small("llama4_text", attention_chunk_size=64, no_rope_layers=[0, 1, 1]), [Layer(), Layer(chunk=64)]),
        (small("modernbert"), [Layer(causal=False), Layer(causal=False, window=65)]),
        (small("bert"), [Layer(causal=False)]),
        (small("bert", is_decoder=True), [Layer()]),
        ({"model_type": "llava", "vision_config": {}, "text_config": small("llama")}, [Layer()]),
        (small("qwen3", layer_types=["linear_attention", "full_attention", "conv"]), [Layer()]),
    ],
)  # fmt: skip
def test_masks_of_layers(config, layers):
    assert [one.layer for one in attentions(config)] == layers


def test_sizes():
    assert attentions({"model_type": "gpt2", "n_embd": 48, "n_head": 3, "n_layer": 2})[0].head_dim == 16
    assert attentions(small("llama", head_dim=32))[0].head_dim == 32
    assert attentions(small("llama", num_key_value_heads=None))[0].heads_kv == 32
    latent = attentions(small("deepseek_v3", kv_lora_rank=512))[0]
    assert (latent.heads_kv, latent.head_dim, latent.head_dim_v) == (32, 192, 128)
    assert unread_parts({"text_config": {}, "vision_config": {}, "quantization_config": {}}) == ["vision_config"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2}, r"head_dim.*hidden_size.*save_pretrained"),
        ({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}, r"num_attention_heads: expected a positive int, got none"),
        (small("llama", num_attention_heads=5), r"head_dim, or a hidden_size that 5 heads divide"),
        (small("llama", num_key_value_heads=3), r"num_key_value_heads: expected a divisor"),
        (small("llama", sliding_window=128), r"sliding_window: expected null, as models of kind llama have none"),
        (small("llama", layer_types=["full_attention"]), r"layer_types: expected num_hidden_layers = 3"),
        (small("gemma2", layer_types=["full_attention", "sparse_thing", "full_attention"]), r"layer_types\[1\].*'sparse_thing'.*TOML"),
        (small("llama", layer_types=["sliding_attention"] * 3), r"layer_types\[0\].*no window in a model of kind llama"),
        (small("qwen2", use_sliding_window=False, layer_types=["sliding_attention"] * 3), r"use_sliding_window: expected true"),
        (small("gemma2", sliding_window=None), r"sliding_window: expected a positive int, got none"),
        (small("gemma2", use_bidirectional_attention=True), r"use_bidirectional_attention"),
        (small("gemma2", attn_logit_softcapping=-1), r"attn_logit_softcapping: expected a positive number"),
        (small("bert", position_embedding_type="relative_key"), r"position_embedding_type.*no bias"),
        (small("bert", add_cross_attention=True), r"cross-attention"),
        (small("bloom"), r"model_type.*bloom.*ALiBi"),
        (small("t5"), r"relative position biases"),
        (small("deepseek_v32"), r"indexer"),
        (small("nobody_knows"), r"model_type: expected one whose attention is known \(llama,.*copy of the file"),
        (SMALL, r"model_type"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(config, says):
    with pytest.raises(ag.InputError, match=says):
        attentions(config)


def test_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small("llama")))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == small("llama")
    (tmp_path / "broken.json").write_text("{")
    for wrong in ("broken.json", "nowhere.json"):
        with pytest.raises(ag.InputError, match=f"--model.*{wrong}"):
            read_config(tmp_path / wrong)


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_are_those_of_transformers(kind):
    """Its class with all defaults, its class with a window asked for, and the same written out in full: one result."""
    transformers = pytest.importorskip("transformers")
    given = {**SMALL, "num_hidden_layers": 8}
    theirs = transformers.AutoConfig.for_model(kind, **given)
    found = attentions({"model_type": kind, **given})
    kinds = getattr(theirs, "layer_types", None)
    if kinds is None:
        window = getattr(theirs, "sliding_window", None)
        kinds = ["sliding_attention" if window is not None and FAMILIES[kind].windows else "full_attention"] * 8
    ours = {place: one.layer for one in found for place in one.layers}
    for place, expected in enumerate(kinds):
        layer = ours[place]
        assert (layer.window is not None) == (expected == "sliding_attention")
        assert (layer.chunk is not None) == (expected == "chunked_attention")
        if layer.window is not None:
            assert layer.window == theirs.sliding_window + FAMILIES[kind].wider
        assert layer.soft_cap == getattr(theirs, "attn_logit_softcapping", None)
    assert found[0].heads_q == theirs.num_attention_heads
    if "v_head_dim" not in theirs.to_dict():
        assert found[0].heads_kv == (getattr(theirs, "num_key_value_heads", None) or theirs.num_attention_heads)
        assert found[0].head_dim == (
            getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        )
    else:
        assert (found[0].head_dim, found[0].head_dim_v) == (
            theirs.qk_nope_head_dim + theirs.qk_rope_head_dim,
            theirs.v_head_dim,
        )
    written = json.loads(theirs.to_json_string())
    assert [(one.layer, one.layers) for one in attentions(written)] == [(one.layer, one.layers) for one in found]


def test_what_is_refused_has_no_family():
    assert not REFUSED.keys() & FAMILIES.keys()
