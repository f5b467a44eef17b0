"""Models of transformers with attngen: what is compiled, by torch and by Triton, and how often."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from attngen.backends.triton import launch as gpu
from attngen.integrations.transformers import register
from attngen.integrations.transformers.attention import attention_function
from attngen.integrations.transformers.masks import make_mask
from tests.compilations import compilation, counted
from tests.integrations.test_transformers import CACHES, GRADIENTS, LOGITS, distance, generated, inputs_of, logits
from tests.integrations.transformers_cases import DECODERS, MODELS, padding, tiny, tokens
from tests.pretend import pretending


@pytest.fixture(autouse=True)
def fresh():
    register()
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "t5"])
def test_no_step_of_a_generation_compiles_a_kernel(name, cache, monkeypatch):
    """After the prompt and one step, while caches grow and slide. The kernels do not run: tokens are whatever memory holds."""
    register("attngen_counted", backend="interpret")
    kernels, model = counted(monkeypatch), tiny(name)
    before: set[Any] = set()

    def after_each_step(ids: torch.Tensor, scores: torch.Tensor, **named: Any) -> torch.Tensor:
        steps.append(set(kernels))
        return torch.full((ids.shape[0],), False)

    for _ in range(2):  # in the second generation nothing at all is new
        steps: list[set[Any]] = []
        generated(model, "attngen_counted", **CACHES[cache], max_new_tokens=20, stopping_criteria=[after_each_step])
        assert len(steps) == 20 and steps[-1] == steps[1] and (not before or steps[-1] == before)
        before = steps[-1]
    assert len(before) >= 2


@pytest.mark.parametrize("padded", [False, True])
def test_steps_on_a_gpu_compile_once_more_where_keys_are_split(padded, monkeypatch):
    """With tensors that pass for a GPU's, and launches that only count: 513 keys are more than one program should read."""
    kernels: set[Any] = set()
    attend, counts = attention_function("auto", frozenset()), {}
    with pretending(kernels=False), monkeypatch.context() as patch:
        patch.setattr(gpu, "_start", lambda source, programs, *given: kernels.add(compilation(source, *given)))
        for keys in (400, 401, 512, 513, 514, 1024, 1025, 5000):
            q, k = (torch.zeros(1, heads, n, 64, device="cuda").half() for heads, n in ((8, 1), (2, keys)))
            keep = torch.arange(keys, device="cuda")[None] >= (5 if padded else 0)
            mask = make_mask(1, 1, keys, keys - 1, attention_mask=keep, device="cuda")
            with torch.no_grad():
                attend(torch.nn.Module(), q, k, k, mask)
            counts[keys] = len(kernels)
    assert counts[512] == counts[400] == 2  # the forward and its guarded kernel
    assert counts[5000] == counts[513] == 5  # those that split, and the merge


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_one_graph(name):
    """fullgraph=True: a graph break is an error. Other tokens, lengths and padding are the same graph, at most once more."""
    model = tiny(name)
    model.set_attn_implementation("attngen")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length, by in ((12, 4), (20, 3), (23, 9)):
        inputs = {"input_ids": tokens(2, length), "attention_mask": padding("left", 2, length, by)}
        inputs |= {"decoder_input_ids": tokens(2, length, 2)} if name == "t5" else {}
        want, got = model(**inputs).logits, compiled(**inputs).logits
        assert distance(got, want) < LOGITS
        got.pow(2).mean().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        want.pow(2).mean().backward()
        wanted = [p.grad for p in model.parameters() if p.grad is not None]
        assert distance(*(torch.cat([g.flatten() for g in x]) for x in (found, wanted))) < GRADIENTS
        model.zero_grad()
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "llama" else pytest.mark.slow) for n in [*DECODERS, "t5"]]
)
def test_generation_with_a_compiled_step(name):
    """What generate does with a static cache on a GPU: masks are made outside of the graph, and go into it."""
    found, graphs = {}, {}
    for implementation in ("eager", "attngen"):
        torch._dynamo.reset()
        counters.clear()
        config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        config._compile_all_devices = True
        model = tiny(name)
        found[implementation] = generated(model, implementation, cache_implementation="static", compile_config=config)
        graphs[implementation] = counters["stats"]["unique_graphs"]
    assert found["attngen"] == found["eager"] and 1 <= graphs["attngen"] <= graphs["eager"]


@pytest.mark.slow
def test_packed_sequences_in_a_graph():
    model = tiny("gemma3")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2]])
    inputs = {"input_ids": tokens(), "position_ids": positions, "use_cache": False}
    want = logits(model, "attngen", inputs)
    assert distance(torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits, want) < LOGITS


@pytest.mark.slow
def test_dropout_in_a_graph():
    """A compiled model draws anew at each call."""
    model = tiny("llama").train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.set_attn_implementation("attngen")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = (compiled(**inputs_of("llama")).logits for _ in range(2))
    assert distance(first, second) > 1e-2


@pytest.mark.slow
def test_inductor():
    model = tiny("llama")
    inputs = inputs_of("llama", attention_mask=padding("left"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = logits(model, "attngen", inputs)
        got = torch.compile(model, fullgraph=True)(**inputs).logits
    assert distance(got, want) < LOGITS
