"""attngen's classes for vLLM on a stand-in of its interface; test_vllm_wheel.py has the real one."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attngen.errors import AttngenWarning, InputError, SpecError
from tests.integrations import vllm_stand_in as stand_in
from tests.integrations.serving_cases import CASES, Case, Inputs, dense, distance
from tests.integrations.vllm_cases import cache_of, common_metadata, config_of, run

OURS = "attngen.integrations.vllm.backend"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The stand-in's modules, where attngen finds them."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    found = stand_in.modules()
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(stand_in, "OVERRIDES", {})
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    yield found
    sys.modules.pop(OURS, None)


@pytest.fixture
def ours(vllm: dict[str, Any]) -> Any:
    return importlib.import_module(OURS)


def impl_of(ours: Any, **named: Any) -> Any:
    return ours.Impl(4, 32, 0.3, 2, **named)


@pytest.mark.parametrize("name", CASES)
def test_mixed_batches(ours, name):
    case = CASES[name]
    inputs = Inputs.of(case)
    assert distance(run(ours.Backend, stand_in, case, inputs), dense(case, inputs)) < 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
def test_either_layout_of_the_cache(ours, interleaved):
    case = Case(block=32, window=20)
    inputs = Inputs.of(case)
    assert distance(run(ours.Backend, stand_in, case, inputs, interleaved=interleaved), dense(case, inputs)) < 1e-5


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_types(ours, dtype, bound):
    case = CASES["all of it"]
    inputs = Inputs.of(case, dtype)
    assert distance(run(ours.Backend, stand_in, case, inputs), dense(case, inputs)) < bound


def test_under_inference_mode(ours):
    case = CASES["window"]
    with torch.inference_mode():
        inputs = Inputs.of(case)
        assert distance(run(ours.Backend, stand_in, case, inputs), dense(case, inputs)) < 1e-5


def test_generated_kernels_read_the_cache_too(ours, monkeypatch):
    from attngen.integrations import serving

    monkeypatch.setattr(ours, "attention_of", lambda kind: serving.attention_of(kind, "interpret"))
    case = Case(requests=((20, 1), (3, 1), (2, 5)), window=9, sinks=True)
    inputs = Inputs.of(case)
    assert distance(run(ours.Backend, stand_in, case, inputs), dense(case, inputs)) < 1e-5


@pytest.mark.parametrize("kind", ["encoder", "encoder_only"])
@pytest.mark.parametrize("window", [None, 5])
def test_encoders_have_no_cache(ours, kind, window):
    case = Case(requests=((0, 11), (0, 3), (0, 11)), causal=False, window=window, alibi=True, soft_cap=2.0)
    inputs = Inputs.of(case)
    impl = impl_of(ours, attn_type=kind, sliding_window=window, alibi_slopes=case.slopes, logits_soft_cap=2.0)
    metadata = builder(ours).build(0, common_metadata(stand_in, case, inputs))
    out = torch.empty_like(inputs.q)
    impl.do_kv_cache_update(None, inputs.k, inputs.v, torch.empty(0), metadata.slot_mapping)
    impl.forward(None, inputs.q, inputs.k, inputs.v, torch.empty(0), metadata, out)
    assert distance(out, dense(case, inputs)) < 1e-5


def builder(ours: Any, block: int = 16) -> Any:
    return ours.MetadataBuilder(SimpleNamespace(block_size=block), ["layer"], config_of(), torch.device("cpu"))


def test_cross_attention_reads_what_is_cached(ours):
    """Queries that are more than the keys, or fewer, and none of them new: vLLM's builder gives seq_lens of the encoder."""
    case = Case(requests=((9, 0), (40, 0)), causal=False)
    inputs = Inputs.of(case)
    q = torch.randn(13, 4, 32)
    common = common_metadata(stand_in, case, inputs)
    common.query_start_loc_cpu = common.query_start_loc = torch.tensor([0, 12, 13], dtype=torch.int32)
    common.num_actual_tokens = 13
    impl, cache, out = impl_of(ours, attn_type="encoder_decoder"), cache_of(case, inputs), torch.empty_like(q)
    for row, (k, v) in enumerate(inputs.old):
        impl.do_kv_cache_update(None, k, v, cache, inputs.cached_slots(case, row))
    impl.forward(None, q, None, None, cache, builder(ours).build(0, common), out)
    for rows, (k, v) in zip((slice(0, 12), slice(12, 13)), inputs.old, strict=True):
        wide = (t.double().transpose(0, 1).repeat_interleave(2, 0) for t in (k, v))
        want = torch.nn.functional.scaled_dot_product_attention(q[rows].double().transpose(0, 1), *wide, scale=0.3)
        assert distance(out[rows], want.transpose(0, 1)) < 1e-5


def test_requests_may_share_pages(ours):
    """How vLLM shares prefixes: tables of several requests name the same blocks."""
    case = Case(requests=((32, 1), (32, 1)))
    inputs = Inputs.of(case)
    inputs.table[1, :2] = inputs.table[0, :2]
    inputs.old[1] = inputs.old[0]
    assert distance(run(ours.Backend, stand_in, case, inputs), dense(case, inputs)) < 1e-5


def test_decoding_is_one_call_and_the_cache_is_not_copied(ours, monkeypatch):
    case, calls = Case(requests=((30, 1), (7, 1), (64, 1), (0, 21))), []
    inputs = Inputs.of(case)
    impl, cache = impl_of(ours), cache_of(case, inputs).zero_()
    metadata = builder(ours).build(0, common_metadata(stand_in, case, inputs))
    attn = ours.attention_of(impl._kind(True, False, 16))

    class Watched:
        handle = attn.handle
        prepare = staticmethod(attn.prepare)

        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: Any) -> torch.Tensor:
            calls.append((tuple(q.shape), q.data_ptr(), k.data_ptr(), v.data_ptr()))
            return attn(q, k, v, **named)

    monkeypatch.setattr(ours, "attention_of", lambda kind: Watched())
    impl.forward(None, inputs.q, inputs.k, inputs.v, cache, metadata, torch.empty_like(inputs.q))
    values = cache[..., 32:].data_ptr()
    assert calls == [
        ((3, 4, 1, 32), inputs.q.data_ptr(), cache.data_ptr(), values),
        ((1, 4, 21, 32), inputs.q[3:].data_ptr(), cache.data_ptr(), values),
    ]


def test_layers_share_what_a_batch_prepares(ours, monkeypatch):
    from attngen.runtime.attention import CompiledAttention

    case, made = CASES["window"], []
    inputs = Inputs.of(case)
    metadata = builder(ours).build(0, common_metadata(stand_in, case, inputs))
    prepare = CompiledAttention.prepare
    monkeypatch.setattr(CompiledAttention, "prepare", lambda self, *a, **n: made.append(self) or prepare(self, *a, **n))
    cache, runs = cache_of(case, inputs).zero_(), 3
    for window, calls in ((9, runs), (9, runs), (None, 2 * runs)):  # another mask checks other pages
        impl = impl_of(ours, sliding_window=window)
        impl.forward(None, inputs.q, inputs.k, inputs.v, cache, metadata, torch.empty_like(inputs.q))
        assert len(made) == calls


def test_a_table_grows_by_doubling(ours):
    widths = []
    for longest in (1, 16, 17, 33, 65, 1000):
        case = Case(requests=((longest - 1, 1),))
        inputs = Inputs.of(case)
        inputs.table = torch.zeros(1, 40, dtype=torch.int32)
        widths.append(builder(ours).build(0, common_metadata(stand_in, case, inputs)).batch.page_table.shape[1])
    assert widths == [1, 1, 2, 4, 8, 40]


def test_profiling_has_no_batch(ours):
    out = torch.full((3, 4, 32), torch.nan)
    assert impl_of(ours).forward(None, out, out, out, torch.empty(0), None, out) is out
    assert out.eq(0).all()


def test_what_vllm_asks_before_it_chooses(ours):
    backend = ours.Backend
    assert backend.get_name() == "CUSTOM" and not backend.forward_includes_kv_cache_update
    assert backend.supports_head_size(80) and not backend.supports_head_size(512)
    assert all(backend.supports_attn_type(kind) for kind in ("decoder", "encoder", "encoder_only", "encoder_decoder"))
    assert not backend.supports_attn_type("another")
    assert backend.supports_sink() and backend.supports_sliding_window() and backend.supports_non_causal()
    assert "fp8" not in backend.supported_kv_cache_dtypes
    assert backend.supports_combination(64, torch.bfloat16, "auto", 16) is None
    assert backend.supports_combination(64, torch.bfloat16, "bfloat16", 16) is None
    assert "float16" in backend.supports_combination(64, torch.bfloat16, "float16", 16)
    assert ours.MetadataBuilder._cudagraph_support is stand_in.AttentionCGSupport.NEVER
    assert builder(ours).reorder_batch_threshold == 1


@pytest.mark.parametrize(
    "named, words",
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: expected one of auto, .*'fp8'; give --kv-cache-dtype auto"),
        ({"use_alibi_sqrt": True}, "use_alibi_sqrt: .*--attention-backend"),
        ({"chunk_lookback": 2}, "chunk_lookback"),
        ({"attn_type": "another"}, "attn_type: expected one of decoder, encoder"),
        ({"something_new": torch.ones(3)}, "something_new: .*what attngen computes"),
        ({"alibi_slopes": [0.5]}, r"alibi_slopes: expected a number for each of 4 heads, got shape \[1\]"),
        ({"sinks": torch.ones(3)}, "sinks"),
    ],
)  # fmt: skip
def test_what_a_layer_must_not_lose_is_an_error(ours, named, words):
    with pytest.raises(InputError, match=words):
        impl_of(ours, **named)


def test_options_that_ask_for_nothing(ours):
    assert (
        impl_of(ours, use_alibi_sqrt=False, chunk_lookback=-1, logits_soft_cap=0.0, sinks=None).logits_soft_cap is None
    )


@pytest.mark.parametrize("name", ["mm_req_doc_ranges", "rswa_prefix_lens", "dcp_local_seq_lens"])
def test_a_batch_whose_mask_is_not_known(ours, name):
    case = CASES["grouped heads"]
    common = common_metadata(stand_in, case, Inputs.of(case))
    setattr(common, name, {0: [(0, 3)]})
    with pytest.raises(InputError, match=f"{name}.*which keys are seen"):
        builder(ours).build(0, common)


def test_what_is_wrong_with_a_call(ours):
    case = CASES["grouped heads"]
    inputs = Inputs.of(case)
    metadata = builder(ours).build(0, common_metadata(stand_in, case, inputs))
    impl, out = impl_of(ours), torch.empty_like(inputs.q)
    with pytest.raises(InputError, match=r"output_scale.*quantised"):
        impl.forward(None, inputs.q, inputs.k, inputs.v, cache_of(case, inputs), metadata, out, torch.ones(1))
    with pytest.raises(InputError, match=r"kv_cache_dtype: expected torch\.float32"):
        impl.forward(None, inputs.q, inputs.k, inputs.v, cache_of(case, inputs).half(), metadata, out)
    with pytest.raises(SpecError, match="window"):
        impl_of(ours, sliding_window=0)


def test_registering(vllm):
    from attngen.integrations.vllm import BACKEND, plugin, register

    register()
    register()
    plugin()
    assert stand_in.OVERRIDES == {stand_in.AttentionBackendEnum.CUSTOM: BACKEND}
    module, _, name = BACKEND.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), name), stand_in.AttentionBackend)


def test_a_name_that_is_taken(vllm):
    from attngen.integrations.vllm import register

    stand_in.OVERRIDES[stand_in.AttentionBackendEnum.CUSTOM] = "another.Backend"
    with pytest.raises(InputError, match=r"free, got one for another.Backend; .*VLLM_PLUGINS=attngen"):
        register()
    assert stand_in.OVERRIDES[stand_in.AttentionBackendEnum.CUSTOM] == "another.Backend"


def test_a_version_whose_interface_moved(vllm):
    from attngen.integrations.vllm import plugin, register

    del vllm["vllm.v1.attention.backend"].AttentionImpl
    with pytest.raises(InputError, match=r"version 0.33.0, with vllm.v1.attention.backend.AttentionImpl.*pip install"):
        importlib.import_module(OURS)
    del vllm["vllm.v1.attention.backends.registry"].register_backend
    with pytest.raises(InputError, match="registry has no register_backend"):
        register()
    with pytest.warns(AttngenWarning, match="no attention backend of this vLLM: .*register_backend"):
        plugin()


def test_without_vllm():
    """And nobody who imports attngen loads it."""
    code = """
import sys, attngen, attngen.integrations.vllm as ours
assert not [name for name in sys.modules if name.split(".")[0] in ("vllm", "sglang")]
sys.modules["vllm"] = None
try:
    ours.register()
except attngen.InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "version 0.33.0" in done.stdout and 'pip install "vllm==0.33.0"' in done.stdout


def test_the_entry_point_names_the_plugin():
    import tomllib
    from pathlib import Path

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["attngen"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
