"""attngen's classes for vLLM on those of its wheel: `pytest -m vllm` fetches it, see vllm_wheel.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attngen.errors import InputError
from attngen.integrations.interface import TESTED
from attngen.integrations.vllm import BACKEND, register
from tests.integrations.serving_cases import CASES, Case, Inputs, dense, distance
from tests.integrations.vllm_cases import cache_of, common_metadata, config_of, run
from tests.integrations.vllm_wheel import wheel_paths

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def classes() -> Any:
    """vllm.v1.attention.backend. What is installed here anyway comes before the wheel's requirements."""
    sys.path += wheel_paths()
    import vllm.v1.attention.backend as found

    return found


@pytest.fixture(scope="module")
def backend(classes: Any) -> Any:
    """As vLLM finds it after its plugins ran."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    register()
    assert AttentionBackendEnum.CUSTOM.get_path() == BACKEND
    found = AttentionBackendEnum.CUSTOM.get_class()
    assert issubclass(found, classes.AttentionBackend) and AttentionBackendEnum[found.get_name()].name == "CUSTOM"
    return found


@pytest.mark.parametrize("name", CASES)
def test_mixed_batches(backend, classes, name):
    case = CASES[name]
    inputs = Inputs.of(case)
    assert distance(run(backend, classes, case, inputs), dense(case, inputs)) < 1e-5


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_types(backend, classes, dtype, bound):
    case = CASES["all of it"]
    inputs = Inputs.of(case, dtype)
    assert distance(run(backend, classes, case, inputs), dense(case, inputs)) < bound


def test_the_version(classes):
    from importlib.metadata import version

    assert version("vllm") == TESTED["vllm"]


CONFIGURATION: dict[str, Any] = {
    "head_size": 64,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "use_mla": False,
    "has_sink": True,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": SimpleNamespace(major=9, minor=0),
    "attn_type": "decoder",
    "has_sliding_window": True,
    "use_non_causal": True,
}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"kv_cache_dtype": "bfloat16", "block_size": 544, "head_size": 256}, None),
        ({"attn_type": "encoder_only"}, None),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"kv_cache_dtype": "float16"}, "give --kv-cache-dtype auto"),
        ({"head_size": 512}, "head_size"),
        ({"use_mla": True}, "MLA"),
        ({"use_sparse": True}, "sparse"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_rswa": True}, "R-SWA"),
        ({"use_dcp": True}, "DCP"),
        ({"use_pcp": True}, "PCP"),
        ({"use_batch_invariant": True}, "batch invariance"),
        ({"use_adaptive_verification": True}, "query lens mismatch"),
        ({"device_capability": SimpleNamespace(major=7, minor=5)}, "compute capability"),
    ],
)  # fmt: skip
def test_vllm_is_told_what_works(backend, change, reason):
    reasons = backend.validate_configuration(**{**CONFIGURATION, **change})
    assert (not reasons) if reason is None else any(reason in found for found in reasons), reasons


def test_blocks_are_cut_into_pages(backend):
    from vllm.v1.worker.utils import select_common_block_size

    assert backend.supports_block_size(544) and not backend.supports_block_size(24)
    assert [select_common_block_size(size, [backend]) for size in (16, 48, 256, 512, 544)] == [16, 16, 256, 256, 32]


def test_vllm_wraps_encoders(backend, classes):
    from vllm.model_executor.layers.attention.encoder_only_attention import create_encoder_only_attention_backend

    wrapped = create_encoder_only_attention_backend(backend)
    case = Case(requests=((0, 11), (0, 3), (0, 11)), window=5, causal=False)
    inputs = Inputs.of(case)
    builder = wrapped.get_builder_cls()(SimpleNamespace(block_size=16), ["layer"], config_of(), torch.device("cpu"))
    impl = wrapped.get_impl_cls()(4, 32, case.scale, 2, sliding_window=5, attn_type="encoder_only")
    metadata, out = (
        builder.build(0, common_metadata(classes, replace(case, causal=True), inputs)),
        torch.empty_like(inputs.q),
    )
    impl.forward(None, inputs.q, inputs.k, inputs.v, torch.empty(0), metadata, out)
    assert distance(out, dense(case, inputs)) < 1e-5


def test_vllm_wraps_cross_attention(backend, classes):
    """Its builder gives seq_lens and slots of the encoder, its layer writes the cache by itself."""
    from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend

    wrapped = create_cross_attention_backend(backend)
    case = Case(requests=((9, 0), (40, 0)), causal=False)
    inputs, q, starts = Inputs.of(case), torch.randn(13, 4, 32), torch.tensor([0, 12, 13], dtype=torch.int32)
    common = common_metadata(classes, case, inputs).replace(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        num_actual_tokens=13,
        max_query_len=12,
        seq_lens=starts.diff(),
        seq_lens_cpu_upper_bound=starts.diff(),
        encoder_seq_lens=torch.tensor(case.lengths, dtype=torch.int32),
        encoder_seq_lens_cpu=torch.tensor(case.lengths, dtype=torch.int32).numpy(),
    )
    builder = wrapped.get_builder_cls()(SimpleNamespace(block_size=16), ["layer"], config_of(), torch.device("cpu"))
    impl = wrapped.get_impl_cls()(4, 32, case.scale, 2, attn_type="encoder_decoder")
    k, v = (torch.cat(parts) for parts in zip(*inputs.old, strict=True))
    layer, out = SimpleNamespace(kv_sharing_target_layer_name=None), torch.empty_like(q)
    impl.forward(layer, q, k, v, cache_of(case, inputs), builder.build(0, common), out)
    for rows, keys in zip((slice(0, 12), slice(12, 13)), inputs.old, strict=True):
        wide = (t.double().transpose(0, 1).repeat_interleave(2, 0) for t in keys)
        want = torch.nn.functional.scaled_dot_product_attention(
            q[rows].double().transpose(0, 1), *wide, scale=case.scale
        )
        assert distance(out[rows], want.transpose(0, 1)) < 1e-5


def test_what_the_builder_says_of_itself(backend, classes):
    builder = backend.get_builder_cls()
    made = builder(SimpleNamespace(block_size=16), ["layer"], config_of(), torch.device("cpu"))
    assert builder.get_cudagraph_support(None, None) is classes.AttentionCGSupport.NEVER
    assert made.reorder_batch_threshold == 1
    case = CASES["grouped heads"]
    common = common_metadata(classes, case, Inputs.of(case))
    with pytest.raises(InputError, match="mm_req_doc_ranges"):
        made.build(0, common.replace(mm_req_doc_ranges={0: [(0, 3)]}))
    assert made.build_for_drafting(common, 0).rows == case.rows
