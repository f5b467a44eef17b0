"""attngen's classes for vLLM on those of its wheel: `pytest -m vllm` fetches it, see vllm_wheel.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attngen.errors import InputError
from attngen.integrations.vllm import BACKEND, TESTED, register
from tests.integrations.serving_cases import CASES, Inputs, dense, distance
from tests.integrations.vllm_cases import common_metadata, config_of, run
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

    assert version("vllm") == TESTED


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
    sizes = backend.get_supported_kernel_block_sizes()
    assert backend.supports_block_size(544) and not backend.supports_block_size(24)
    assert max(size for size in sizes if 544 % size == 0) == 32


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
