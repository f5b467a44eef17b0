"""The implementations that are compared: for a case's inputs, each gives a function that computes the attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

import attngen as ag
from attngen.language.call import bind
from benchmarks.case import FORWARD
from benchmarks.work import Inputs

PAGE = 16  # keys, where a cache is paged
MOST_MASK_ELEMENTS = 2**32  # of a dense mask or of the matrix that unfused attention makes

Attention = Callable[[], torch.Tensor]  # computes out [B, Hq, Nq, D] from the inputs it was built for


class Unavailable(Exception):
    """This peer cannot do this case here; the message says why."""


@dataclass(frozen=True)
class Built:
    """An implementation ready to run. notes: what else belongs into its record, as the schedule and its origin."""

    run: Attention
    notes: dict[str, Any] = field(default_factory=dict)


Build = Callable[[Inputs], Built]


def attngen(inputs: Inputs) -> Built:
    """attngen as a user calls it: tuned records where the database has them."""
    attn, captures = ag.compile(inputs.pattern.spec), inputs.captures
    call = bind(inputs.pattern.spec, inputs.q, inputs.k, inputs.v, captures=captures)
    stages = attn.specialiser.of(call)
    notes = {"schedule": stages.schedule.decided(), "origin": stages.origin}
    return Built(lambda: attn(inputs.q, inputs.k, inputs.v, **captures), notes)


def variant(**decisions: Any) -> Build:
    """attngen with decisions of the schedule pinned, the others as the user has them: what a day on a GPU compares."""

    def build(inputs: Inputs) -> Built:
        if inputs.q.device.type != "cuda":
            raise Unavailable("a GPU's schedule")
        spec, captures = inputs.pattern.spec, inputs.captures
        attn = ag.compile(spec, schedule=ag.Schedule(**decisions))
        try:
            stages = attn.specialiser.of(bind(spec, inputs.q, inputs.k, inputs.v, captures=captures))
        except ag.ScheduleError as error:
            raise Unavailable(str(error)) from error
        notes = {"schedule": stages.schedule.decided(), "origin": stages.origin}
        return Built(lambda: attn(inputs.q, inputs.k, inputs.v, **captures), notes)

    return build


def paged(inputs: Inputs) -> Built:
    """attngen on a cache in shuffled pages of 16, laid out beforehand."""
    case = inputs.case
    if case.direction != FORWARD or case.pattern not in ("full", "lengths") or case.n_k % PAGE:
        raise Unavailable(f"a forward over whole pages of {PAGE}, of all keys or up to a length")
    count = case.batch * case.n_k // PAGE
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(inputs.q.device)
    table = order.argsort().view(case.batch, -1).int()
    k, v = (t.transpose(1, 2).reshape(count, PAGE, *t.shape[1::2])[order] for t in (inputs.k, inputs.v))
    length = inputs.span[1][:, 0].expand(case.batch).to(inputs.q.device)
    attn = ag.compile(ag.Spec(keys=ag.paged(PAGE)))
    return Built(lambda: attn(inputs.q, k, v, page_table=table, k_len=length))


# -- SDPA -------------------------------------------------------------------------------------------------------------


REPEATED = {"keys and values": "repeated for the group, inside the timing"}


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """SDPA on q [B, Hq, Nq, D] and k, v [B, Hkv, Nk, D], by a backend that knows groups of heads."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **arguments)


def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """The same by a backend that takes as many heads of k and v as of q: what its user does, gradients included."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, **arguments)


def sdpa(inputs: Inputs, attention: Callable[..., torch.Tensor] = grouped) -> Built:
    """scaled_dot_product_attention with whatever backend it picks. A dense mask is made beforehand and not timed; adding a
    learned bias to it is. attention: `grouped` or `repeated`.
    """
    case, pattern = inputs.case, inputs.pattern
    notes = REPEATED if attention is repeated and case.heads_q != case.heads_kv else {}
    arguments: dict[str, Any] = {}
    if pattern.sdpa == "":
        raise Unavailable(f"SDPA has no {case.pattern}")
    if pattern.sdpa == "causal":
        arguments["is_causal"] = True
    if pattern.sdpa == "mask" and pattern.sdpa_bias is None:
        arguments["attn_mask"] = dense_mask(inputs)
    q, k, v, bias = inputs.q, inputs.k, inputs.v, pattern.sdpa_bias
    if bias is None:
        return Built(lambda: attention(q, k, v, **arguments), notes)
    mask, captures = dense_mask(inputs), {**inputs.captures, "n": case.n_k}
    if pattern.learned:
        hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)

        def run() -> torch.Tensor:
            total = bias(captures) + hidden  # changes at each step, so it is part of the call
            return attention(q, k, v, attn_mask=total, **arguments)

        return Built(run, notes)
    total = bias(captures).masked_fill(~mask, -torch.inf).to(q.dtype)
    return Built(lambda: attention(q, k, v, attn_mask=total, **arguments), notes)


def dense_mask(inputs: Inputs) -> torch.Tensor:
    """The pattern's mask, bool [B or 1, 1, Nq, Nk]. Unavailable where it would be too large."""
    low, high = (t.to(inputs.q.device)[:, None, :, None] for t in inputs.span)
    elements = low.numel() * inputs.case.n_k
    if elements > MOST_MASK_ELEMENTS // 4:
        raise Unavailable(f"its dense mask would have {elements / 2**30:.0f} Gi elements")
    keys = torch.arange(inputs.case.n_k, device=inputs.q.device)
    return (keys >= low) & (keys < high)


def sdpa_backend(name: str, cuda_only: bool) -> Build:
    """SDPA with one backend forced. The efficient one knows no groups of heads."""

    def build(inputs: Inputs) -> Built:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        case = inputs.case
        if cuda_only and inputs.q.device.type != "cuda":
            raise Unavailable(f"SDPA's {name} backend needs a GPU")
        if name == "MATH" and case.batch * case.heads_q * case.n_q * case.n_k > MOST_MASK_ELEMENTS:
            raise Unavailable("its matrix of weights would not fit")
        if name == "FLASH_ATTENTION" and inputs.pattern.sdpa == "mask" and inputs.q.device.type == "cuda":
            raise Unavailable("SDPA's flash backend takes no mask on a GPU")
        backend = getattr(SDPBackend, name)
        built = sdpa(inputs, repeated if name == "EFFICIENT_ATTENTION" else grouped)

        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return built.run()

        return Built(run, built.notes)

    return build


# -- FlexAttention ----------------------------------------------------------------------------------------------------


def flex(mode: str | None = None) -> Build:
    """FlexAttention through torch.compile for exactly these shapes; its block mask is made beforehand and not timed."""

    def build(inputs: Inputs) -> Built:
        case, pattern = inputs.case, inputs.pattern
        if inputs.q.device.type == "cpu" and case.direction != FORWARD:
            raise Unavailable("FlexAttention has no backward on a CPU")
        if case.n_q == 1 and inputs.q.device.type == "cpu":
            raise Unavailable("not tried: FlexAttention's decoding is a GPU kernel")
        function, block_mask = compiled_flex(mode), block_mask_of(inputs, compiled=inputs.case.n_k > 32768)
        score = pattern.flex_score(inputs.captures) if pattern.flex_score else None
        gqa = case.heads_q != case.heads_kv
        return Built(
            lambda: function(inputs.q, inputs.k, inputs.v, score_mod=score, block_mask=block_mask, enable_gqa=gqa)
        )

    return build


def compiled_flex(mode: str | None) -> Callable[..., torch.Tensor]:
    """A new compiled flex_attention."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, mode=mode, dynamic=False, fullgraph=True)


def forget_compiled() -> None:
    """Before each case, since the recompiles of earlier ones would end in the eager path. Not between the peers of a case: those
    built before would compile again where they are timed.
    """
    import torch._dynamo

    torch._dynamo.reset()


def block_mask_of(inputs: Inputs, compiled: bool = False) -> Any:
    """FlexAttention's metadata for the pattern's mask, None for full attention. Not compiled, it makes dense masks."""
    from torch.nn.attention.flex_attention import create_block_mask

    case, pattern = inputs.case, inputs.pattern
    if pattern.flex_mask is None:
        return None
    by_batch = case.batch if inputs.span[0].shape[0] > 1 else None
    mask = pattern.flex_mask(inputs.captures)
    return create_block_mask(mask, by_batch, None, case.n_q, case.n_k, device=inputs.q.device, _compile=compiled)


# -- FlashInfer -------------------------------------------------------------------------------------------------------


def flashinfer(inputs: Inputs) -> Built:
    """FlashInfer's ragged prefill, and its paged decode (pages of 16, laid out beforehand); planning is not timed."""
    case = inputs.case
    if inputs.q.device.type != "cuda":
        raise Unavailable("FlashInfer needs a GPU")
    if find_spec("flashinfer") is None:
        raise Unavailable("FlashInfer is not installed")
    if case.direction != FORWARD:
        raise Unavailable("FlashInfer has no backward")
    if case.pattern not in ("full", "causal", "causal window", "soft cap", "lengths"):
        raise Unavailable(f"FlashInfer has no {case.pattern}")
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=inputs.q.device)
    return (_flashinfer_decode if case.n_q == 1 else _flashinfer_prefill)(inputs, workspace)


def _flashinfer_prefill(inputs: Inputs, workspace: torch.Tensor) -> Built:
    import flashinfer

    case = inputs.case
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=inputs.q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        starts * case.n_q, starts * case.n_k, case.heads_q, case.heads_kv, case.head_dim,
        causal=case.pattern != "full",
        window_left=inputs.captures["width"] - 1 if case.pattern == "causal window" else -1,
        logits_soft_cap=30.0 if case.pattern == "soft cap" else None,
        q_data_type=inputs.q.dtype,
    )  # fmt: skip
    q, k, v = (t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in (inputs.q, inputs.k, inputs.v))

    def run() -> torch.Tensor:
        return wrapper.run(q, k, v).view(case.batch, case.n_q, case.heads_q, -1).transpose(1, 2)

    return Built(run)


def _flashinfer_decode(inputs: Inputs, workspace: torch.Tensor) -> Built:
    import flashinfer

    case, device = inputs.case, inputs.q.device
    lengths = inputs.span[1][:, 0].expand(case.batch)
    if case.n_k % PAGE or case.pattern not in ("full", "lengths"):
        raise Unavailable(f"not tried: a cache that is no multiple of {PAGE}, or a masked one")
    pages = -(-lengths // PAGE)
    of_batch = torch.arange(case.batch) * (case.n_k // PAGE)  # the first page of each sequence
    indices = torch.cat([first + torch.arange(int(count)) for first, count in zip(of_batch, pages, strict=True)])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), pages.cumsum(0)])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        indptr.int().to(device), indices.int().to(device), (lengths - (pages - 1) * PAGE).int().to(device),
        case.heads_q, case.heads_kv, case.head_dim, PAGE, q_data_type=inputs.q.dtype, kv_data_type=inputs.q.dtype,
    )  # fmt: skip
    cache = tuple(t.transpose(1, 2).reshape(-1, PAGE, t.shape[1], t.shape[3]) for t in (inputs.k, inputs.v))
    q = inputs.q[:, :, 0].contiguous()
    return Built(lambda: wrapper.run(q, cache)[:, :, None])


# -- cuDNN's flex -----------------------------------------------------------------------------------------------------


def cudnn_flex(inputs: Inputs) -> Built:
    """flex_attn_func of cuDNN's frontend (1.32 or newer), on keys by intervals; its mask plan is made beforehand and not timed."""
    if inputs.q.device.type != "cuda":
        raise Unavailable("cuDNN's flex needs a GPU")
    if find_spec("cudnn") is None:
        raise Unavailable("cuDNN's frontend is not installed")
    try:
        from cudnn.flex_attention import create_mask_plan, flex_attn_func
    except ImportError as problem:
        raise Unavailable(f"this cuDNN frontend has no flex attention, or not what it needs: {problem}") from problem
    return by_intervals(inputs, create_mask_plan, flex_attn_func)


def by_intervals(inputs: Inputs, plan_of: Callable[..., Any], attend: Callable[..., torch.Tensor]) -> Built:
    """The case through cuDNN's two functions, which take tensors [B, N, H, D]."""
    if inputs.pattern.flex_score is not None:
        raise Unavailable(f"cuDNN's flex has no score function, which {inputs.case.pattern} needs")

    def laid_out() -> tuple[torch.Tensor, ...]:
        return tuple(tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))

    try:
        plan = plan_of(endpoints(inputs), *laid_out(), build_backward=inputs.backward)
    except NotImplementedError as problem:
        raise Unavailable(f"cuDNN's flex: {problem}") from problem
    return Built(lambda: attend(*laid_out(), mask_plan=plan).transpose(1, 2))


def endpoints(inputs: Inputs) -> torch.Tensor:
    """The keys that each query sees as cuDNN's flex takes them, int32 [1, 1 or 3, B Nq]: [0, F0) and [F1, F2)."""
    low, high = (bound.expand(inputs.case.batch, -1).reshape(-1) for bound in inputs.span)
    high = high.maximum(low)  # a query without keys
    ends = [torch.zeros_like(low), low, high] if bool(low.any()) else [high]
    return torch.stack(ends)[None].to(inputs.q.device, torch.int32).contiguous()


# attngen itself in other ways: measured in the same turns, but nobody's rival.
VARIANTS: Mapping[str, Build] = {
    "attngen-no-split": variant(split=1),
    "attngen-split-8": variant(split=8),
    "attngen-stream": variant(split="stream"),
    "attngen-paged": paged,
    "attngen-tma": variant(tma=True),
    "attngen-warp-specialize": variant(
        block_m=128, block_n=64, num_warps=4, num_stages=2, tma=True, warp_specialize=True
    ),
    "attngen-persistent": variant(persistent=1),
    "attngen-by-head": variant(order="by_head"),
}

PEERS: Mapping[str, Build] = {
    "attngen": attngen,
    **VARIANTS,
    "sdpa": sdpa,
    "sdpa-cudnn": sdpa_backend("CUDNN_ATTENTION", cuda_only=True),
    "sdpa-flash": sdpa_backend("FLASH_ATTENTION", cuda_only=False),
    "sdpa-efficient": sdpa_backend("EFFICIENT_ATTENTION", cuda_only=True),
    "sdpa-math": sdpa_backend("MATH", cuda_only=False),
    "flex": flex(),
    "flex-max-autotune": flex("max-autotune-no-cudagraphs"),
    "flashinfer": flashinfer,
    "cudnn-flex": cudnn_flex,
}
