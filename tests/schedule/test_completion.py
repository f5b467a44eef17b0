"""From decisions to a complete schedule, on a GPU and on the CPU, and what a target can't have."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.analysis import facts
from attngen.language.call import bind
from attngen.language.lists import TileLists
from attngen.language.schedule import KERNELS, PLAIN
from attngen.schedule import TARGETS, Target, complete, fit
from attngen.schedule.choice import why_not_readable
from attngen.schedule.completion import complete_on_cpu
from attngen.schedule.defaults import default_tile
from attngen.schedule.legality import why_not_targeted

H100 = Target.named("sm_90")
LENGTH = ag.Tensor("length", 1, dtype=torch.int32)


def test_the_first_who_decides_wins_and_the_model_fills_the_rest() -> None:
    pins, tuned = ag.Schedule(block_m=32, split=3), ag.Schedule(block_m=64, num_warps=4, dq_tma=True, split=2)
    spec = ag.Spec(mask=ag.causal())
    schedule = complete(spec, H100, 64, 128, torch.bfloat16, pins, None, tuned)
    default = default_tile(spec, H100, "forward", 128, torch.bfloat16)
    ordered = ag.Tile(order="longest_first").over(PLAIN)
    assert schedule.forward == replace(default, block_m=32, num_warps=4).over(PLAIN)
    assert schedule.dq.tma is True and schedule.forward.tma is False and schedule.split == 3
    assert schedule.dkv == default_tile(spec, H100, "dkv", 128, torch.bfloat16).over(ordered)
    assert schedule.deterministic is True and schedule.precision == "ieee"
    assert all(getattr(schedule, kernel) == schedule.tile(kernel) for kernel in KERNELS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_target_has_a_whole_default(target: str, dtype: torch.dtype) -> None:
    for head_dim in (16, 64, 80, 128, 192, 256):
        schedule = complete(ag.Spec(mask=ag.causal()), Target.named(target), head_dim, head_dim, dtype)
        for kernel in KERNELS:
            assert not why_not_targeted(kernel, schedule.tile(kernel), Target.named(target))


@pytest.mark.parametrize(
    ("kernel", "tile", "target", "says"),
    [
        ("forward", ag.Tile(block_n=512), "sm_90", "block_n: at most 256 on a GPU, got 512"),
        ("dkv", ag.Tile(tma=True), "sm_80", "tma: sm_80 has no tensor descriptors"),
        ("dq", ag.Tile(separate_sums=True), "sm_90", "separate_sums: a key tile alone has two sums; it goes with dkv"),
        ("dq", ag.Tile(tma=True), "gfx942", "tma: gfx942 has no tensor descriptors"),
        ("dq", ag.Tile(tma=True, warp_specialize=True), "sm_90", "the compiler takes the forward only"),
        ("forward", ag.Tile(warp_specialize=True), "sm_90", "needs tma=True"),
        ("forward", ag.Tile(tma=True, warp_specialize=True, num_warps=8), "sm_90", "takes num_warps=4, got 8"),
        ("forward", ag.Tile(tma=True, warp_specialize=True, num_warps=8), "sm_100", ""),
        ("forward", ag.Tile(), "sm_80", ""),
    ],
)
def test_what_a_target_cannot_have(kernel: str, tile: ag.Tile, target: str, says: str) -> None:
    reason = why_not_targeted(kernel, tile, Target.named(target))
    assert says in reason and bool(says) == bool(reason)
    if reason:
        pins = ag.Schedule().with_tile(kernel, tile)
        with pytest.raises(ag.ScheduleError, match=f"^{kernel} "):
            complete(ag.Spec(), Target.named(target), 64, 64, torch.float16, pins)


CAUSAL, BIAS = ag.causal(), ag.bias("hij")


@pytest.mark.parametrize(
    ("spec", "pins", "first"),
    [
        (ag.Spec(mask=CAUSAL), ag.Schedule(), KERNELS),
        (ag.Spec(mask=lambda b, h, i, j: (i >= j) & (j < LENGTH[b])), ag.Schedule(), KERNELS),
        (ag.Spec(mask="i >= j or j < 7"), ag.Schedule(), KERNELS),
        (ag.Spec(mask="i // 64 >= j // 64"), ag.Schedule(), KERNELS),
        (ag.Spec(mask=CAUSAL & (ag.window(64) | ag.global_tokens(4))), ag.Schedule(), ["dkv"]),  # all see those tokens
        (ag.Spec(mask=CAUSAL, score=BIAS), ag.Schedule(), ["forward", "dkv"]),  # dq adds up its gradient over the batch
        (ag.Spec(mask=CAUSAL, score=ag.bias("bhij")), ag.Schedule(), KERNELS),
        (ag.Spec(mask=CAUSAL), ag.Schedule(split=4), ["dq", "dkv"]),
        (ag.Spec(mask=CAUSAL), ag.Schedule(order="by_head", split=1), ["dq", "dkv"]),
        (ag.Spec(mask=CAUSAL), ag.Schedule(dq_order="by_head", dkv_order="by_head"), ["forward"]),
        (ag.Spec(), ag.Schedule(), []),
        (ag.Spec(mask=CAUSAL & ag.window(64)), ag.Schedule(), []),
        (ag.Spec(mask="i <= j"), ag.Schedule(), []),  # the first queries have most
        (ag.Spec(mask=CAUSAL & ag.documents()), ag.Schedule(), []),  # data decides
    ],
)
def test_the_longest_come_first_where_the_mask_says_which(spec: ag.Spec, pins: ag.Schedule, first: list[str]) -> None:
    schedule = complete(spec, H100, 64, 64, torch.bfloat16, pins)
    assert [kernel for kernel in KERNELS if schedule.tile(kernel).order == "longest_first"] == list(first)


def test_blocks_divide_listed_tiles() -> None:
    lists, schedule = TileLists(48, 32), ag.Schedule(block_m=128, block_n=64, dkv_block_n=16)
    fitted = fit(schedule, lists)
    assert fitted == ag.Schedule(block_m=16, block_n=32, dkv_block_n=16)
    assert fit(schedule, None, schedule) is schedule
    with pytest.raises(ag.ScheduleError, match=r"^block_m: expected a divisor of the listed tiles' 48, got 128"):
        fit(schedule, lists, ag.Schedule(block_m=128))
    with pytest.raises(ag.ScheduleError, match=r"^dkv_block_n: expected a divisor of the listed tiles' 32, got 64"):
        fit(ag.Schedule(dkv_block_n=64), lists, ag.Schedule(dkv_block_n=64))


@pytest.mark.parametrize(
    ("spec", "group", "n_q", "rows"),
    [
        (ag.Spec(mask=ag.causal()), 1, 4096, 128),
        (ag.Spec(mask=ag.causal()), 2, 4096, 64),
        (ag.Spec(mask=ag.causal()), 8, 4096, 32),
        (ag.Spec(mask=ag.causal()), 1, 50, 64),
        (ag.Spec(mask=ag.causal()), 1, 1, 32),
        (ag.Spec(mask="j < length[b]", tensors=[ag.Tensor("length", 1, dtype=torch.int32)]), 1, 4096, 256),
    ],
)
def test_the_cpus_default(spec: ag.Spec, group: int, n_q: int, rows: int) -> None:
    q, k = torch.empty(1, 8, n_q, 64), torch.empty(1, 8 // group, n_q, 64)
    captures: dict[str, Any] = {"length": torch.ones(1, dtype=torch.int32)} if spec.tensors else {}
    call = bind(spec, q, k, k, captures=captures)
    whole = complete_on_cpu(call, facts(spec), ag.Schedule())
    assert str(whole) == f"block_m={rows}, block_n=1024, dq_block_m={rows}, dq_block_n=1024"
    pinned = complete_on_cpu(call, facts(spec), ag.Schedule(block_n=256), ag.Schedule(block_m=512, block_n=64))
    assert pinned == ag.Schedule(block_m=512, block_n=256).over(whole)


def test_a_record_that_is_none_of_ours_has_a_reason() -> None:
    assert why_not_readable({"block_m": 64, "dq_order": "by_head"}) == ""
    assert "did you mean num_warps" in why_not_readable({"num_warp": 4})
    assert "power of two" in why_not_readable({"block_m": 65})
