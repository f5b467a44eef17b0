"""attngen's backend for SGLang, on a stand-in of its interface."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attngen.errors import InputError
from tests.integrations import sglang_stand_in as stand_in
from tests.integrations.serving_cases import CASES, Case, Inputs, dense, distance

OURS = "attngen.integrations.sglang.backend"
SERVED = {name: case for name, case in CASES.items() if case.causal is True and not case.alibi}
NEVER = ("requests that fill up",)  # SGLang's batches have none


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The stand-in's modules, where attngen finds them."""
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    found = stand_in.modules()
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(stand_in, "ATTENTION_BACKENDS", {})
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    yield found
    sys.modules.pop(OURS, None)
    stand_in.ATTENTION_BACKEND_CHOICES[:] = ["triton", "torch_native"]


@pytest.fixture
def ours(sglang: dict[str, Any]) -> Any:
    return importlib.import_module(OURS)


def layer_of(case: Case, **named: Any) -> stand_in.Layer:
    window = -1 if case.window is None else case.window - 1  # a distance, there
    return stand_in.Layer(
        case.heads,
        case.kv_heads,
        case.head_dim,
        case.head_dim,
        case.scale,
        logit_cap=case.soft_cap or 0.0,
        sliding_window_size=window,
        **named,
    )


def runner_of(case: Case, inputs: Inputs, pool: stand_in.Pool | None = None) -> stand_in.ModelRunner:
    """The requests stand in the table of all in reverse order, behind a row that is nobody's."""
    pool = pool or stand_in.Pool(inputs.blocks * case.block, case.kv_heads, case.head_dim, inputs.q.dtype)
    slots = inputs.table.long()[:, :, None] * case.block + torch.arange(case.block)
    slots = torch.where(inputs.table[:, :, None] == 9999, 0, slots)  # of requests that are gone
    table = torch.cat([slots.flatten(1), torch.zeros(1, slots.shape[1] * case.block, dtype=torch.long)]).flip(0)
    return stand_in.ModelRunner(pool, table.int(), case.block)


def batch_of(case: Case, inputs: Inputs) -> stand_in.ForwardBatch:
    counts, lengths = [new for _, new in case.requests], torch.tensor(case.lengths)
    decode = all(count == 1 for count in counts)
    return stand_in.ForwardBatch(
        stand_in.ForwardMode.DECODE if decode else stand_in.ForwardMode.MIXED,
        len(counts),
        torch.arange(len(counts), 0, -1),
        lengths,
        inputs.slots,
        seq_lens_cpu=lengths.clone(),
        extend_seq_lens_cpu=None if decode else counts,
    )


def run(ours: Any, case: Case, inputs: Inputs, padding: int = 0, **named: Any) -> torch.Tensor:
    """out [rows, Hq, D]."""
    runner, batch, layer = runner_of(case, inputs), batch_of(case, inputs), layer_of(case, **named)
    backend = ours.Backend(runner)
    for row, (k, v) in enumerate(inputs.old):
        loc = stand_in.KVWriteLoc(inputs.cached_slots(case, row))
        runner.token_to_kv_pool.set_kv_buffer(layer, loc, k, v)
    backend.init_forward_metadata(batch)
    q = torch.cat([inputs.q, inputs.q.new_zeros(padding, case.heads, case.head_dim)])
    sinks = {"sinks": case.sinks_of(inputs.q.dtype)} if case.sinks else {}
    out = backend.forward(q.flatten(1), inputs.k, inputs.v, layer, batch, **sinks)
    assert out.shape == (case.rows + padding, case.heads * case.head_dim) and out[case.rows :].eq(0).all()
    return out[: case.rows].view(-1, case.heads, case.head_dim)


@pytest.mark.parametrize("name", [name for name in SERVED if name not in NEVER])
@pytest.mark.parametrize("page", [1, 16, None])
def test_mixed_batches(ours, name, page):
    case = SERVED[name] if page is None else replace(SERVED[name], block=page)
    inputs = Inputs.of(case)
    assert distance(run(ours, case, inputs), dense(case, inputs)) < 1e-5


def test_encoders(ours):
    case = Case(requests=((0, 11), (0, 3), (0, 11)), causal=False, window=5)
    inputs = Inputs.of(case)
    got = run(ours, case, inputs, attn_type=stand_in.AttentionType.ENCODER_ONLY)
    assert distance(got, dense(case, inputs)) < 1e-5


def test_rows_that_fill_up_are_zero(ours):
    case = CASES["only decoding"]
    inputs = Inputs.of(case)
    assert distance(run(ours, case, inputs, padding=3), dense(case, inputs)) < 1e-5


def test_half_types(ours):
    case = CASES["sinks"]
    inputs = Inputs.of(case, torch.bfloat16)
    assert distance(run(ours, case, inputs), dense(case, inputs)) < 8e-3


def test_without_lengths_on_the_host(ours):
    case = CASES["only decoding"]
    inputs = Inputs.of(case)
    backend, batch = ours.Backend(runner_of(case, inputs)), batch_of(case, inputs)
    batch.seq_lens_cpu = None
    backend.init_forward_metadata(batch)
    assert backend.forward_metadata.full.page_table.shape[1] == inputs.table.shape[1]


def test_windows_with_a_pool_of_their_own(ours):
    """Every other layer's keys lie in other slots, which the pool translates to."""
    full = Case(requests=((30, 1), (7, 1), (0, 21)))
    window, inputs = replace(full, window=9), Inputs.of(full)
    pages = torch.randperm(inputs.blocks - 1, generator=torch.Generator().manual_seed(3)) + 1
    mapping = torch.cat([torch.zeros(1, dtype=torch.long), pages])[:, None] * 16 + torch.arange(16)
    slots = inputs.blocks * 16
    pool = stand_in.WindowPool(slots, 2, 32, torch.float32, mapping=mapping.flatten(), windowed=(False, True))
    backend, batch = ours.Backend(runner_of(full, inputs, pool)), batch_of(full, inputs)
    backend.init_forward_metadata(batch)
    for place, case in enumerate((full, window)):
        layer = layer_of(case, layer_id=place)
        for row, (k, v) in enumerate(inputs.old):
            loc = inputs.cached_slots(case, row)
            loc = stand_in.KVWriteLoc(loc, pool.translate_loc_from_full_to_swa(loc))
            pool.set_kv_buffer(layer, loc, k, v)
        got = backend.forward(inputs.q.flatten(1), inputs.k, inputs.v, layer, batch)
        assert distance(got.view(-1, 4, 32), dense(case, inputs)) < 1e-5


def test_the_pool_is_not_copied(ours):
    case = Case(requests=((30, 1),))
    inputs = Inputs.of(case)
    runner = runner_of(case, inputs)
    buffer = runner.token_to_kv_pool.get_key_buffer(0)
    pages = ours.Backend(runner)._pages(buffer)
    assert pages.shape == (inputs.blocks, 2, 16, 32) and pages.data_ptr() == buffer.data_ptr()
    with pytest.raises(InputError, match=r"the cache: expected .slots, Hkv, head dim.*leave its layout"):
        ours.Backend(runner)._pages(buffer[None])


def test_an_idle_batch(ours):
    case = CASES["only decoding"]
    inputs = Inputs.of(case)
    backend, batch = ours.Backend(runner_of(case, inputs)), batch_of(case, inputs)
    batch.forward_mode = stand_in.ForwardMode.IDLE
    backend.init_forward_metadata(batch)
    assert backend.forward(inputs.q.flatten(1), None, None, layer_of(case), batch).shape == (3, 128)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_mla_backend": True}, "MLA.*--attention-backend"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size"),
        ({"page_size": 512}, "--page-size: expected from 1 to 256, got 512"),
        ({"kv_index_translator": SimpleNamespace(is_translating=True)}, "unified pool"),
        ({"token_to_kv_pool": stand_in.Pool(16, 2, 32, torch.float8_e5m2), "kv_cache_dtype": torch.float8_e5m2},
         "--kv-cache-dtype: .*float8_e5m2; leave out"),
    ],
)  # fmt: skip
def test_caches_that_are_not_read(ours, change, words):
    case = CASES["only decoding"]
    with pytest.raises(InputError, match=words):
        ours.Backend(replace(runner_of(case, Inputs.of(case)), **change))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"forward_mode": stand_in.ForwardMode.TARGET_VERIFY}, "forward_mode: .*TARGET_VERIFY"),
        ({"spec_info": object()}, "spec_info.*which keys are seen"),
        ({"encoder_lens": torch.ones(3)}, "encoder_lens"),
        ({"multi_item_delimiter_indices": [0]}, "multi_item_delimiter_indices"),
    ],
)
def test_batches_whose_mask_is_not_known(ours, change, words):
    case = CASES["only decoding"]
    inputs = Inputs.of(case)
    with pytest.raises(InputError, match=words):
        ours.Backend(runner_of(case, inputs)).init_forward_metadata(replace(batch_of(case, inputs), **change))


@pytest.mark.parametrize(
    "layer, options, words",
    [
        ({"is_cross_attention": True}, {}, "is_cross_attention"),
        ({"pos_encoding_mode": "ALIBI"}, {}, "pos_encoding_mode: expected NONE, got ALIBI"),
        ({"logit_capping_method": "other"}, {}, "logit_capping_method"),
        ({"xai_temperature_len": 1024}, {}, "xai_temperature_len"),
        ({"attn_type": stand_in.AttentionType.DECODER_BIDIRECTIONAL}, {}, "decoder_bidirectional"),
        ({}, {"score_mod": max}, "score_mod: expected what attngen computes"),
        ({}, {"k_rope": torch.ones(1)}, "k_rope"),
    ],
)
def test_what_a_layer_must_not_lose_is_an_error(ours, layer, options, words):
    case = CASES["only decoding"]
    inputs = Inputs.of(case)
    backend, batch = ours.Backend(runner_of(case, inputs)), batch_of(case, inputs)
    backend.init_forward_metadata(batch)
    with pytest.raises(InputError, match=words):
        backend.forward(inputs.q, inputs.k, inputs.v, layer_of(case, **layer), batch, **options)


def test_graphs_are_refused_by_the_name_of_the_switch(ours):
    case = CASES["only decoding"]
    inputs = Inputs.of(case)
    backend, batch = ours.Backend(runner_of(case, inputs)), batch_of(case, inputs)
    for ask in (
        lambda: backend.init_cuda_graph_state(8, 8),
        lambda: backend.init_forward_metadata_out_graph(batch, in_capture=True),
    ):
        with pytest.raises(InputError, match="--cuda-graph-backend-decode=disabled"):
            ask()
    with pytest.raises(InputError, match="--cuda-graph-backend-prefill=disabled"):
        backend.init_forward_metadata_for_breakable_cuda_graph_capture(batch)
    backend.init_forward_metadata_out_graph(batch)
    assert backend.forward_metadata is not None


def test_registering(sglang):
    from attngen.integrations.sglang import register

    register()
    register()
    assert stand_in.ATTENTION_BACKEND_CHOICES.count("attngen") == 1
    case = CASES["only decoding"]
    backend = stand_in.ATTENTION_BACKENDS["attngen"](runner_of(case, Inputs.of(case)))
    assert isinstance(backend, stand_in.AttentionBackend)


def test_a_version_whose_interface_moved(sglang):
    from attngen.integrations.sglang import register

    del sglang["sglang.srt.mem_cache.memory_pool"].KVWriteLoc
    with pytest.raises(InputError, match=r"version 0\.5\.23, with sglang\.srt\.mem_cache\.memory_pool\.KVWriteLoc"):
        importlib.import_module(OURS)
    del sglang["sglang.srt.arg_groups.choices"].add_attention_backend_choices
    with pytest.raises(InputError, match=r"no add_attention_backend_choices; pip install .sglang==0\.5\.23"):
        register()


def test_the_entry_point_names_it():
    import tomllib
    from pathlib import Path

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["sglang.srt.plugins"]["attngen"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
