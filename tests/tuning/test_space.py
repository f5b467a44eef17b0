"""What may be chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attngen.analysis import facts
from attngen.errors import ScheduleError
from attngen.language.expression import Tensor
from attngen.language.schedule import KERNELS
from attngen.language.spec import Spec
from attngen.schedule import Schedule, Target, choice
from attngen.store import Shape
from attngen.tuning.attends import Part
from attngen.tuning.jobs import Job
from attngen.tuning.space import cpu_space, gpu_space, special_forms
from attngen.tuning.target_device import _empty_call, find_target_device

SHAPE = Shape(1, 4, 2, 256, 256, 32, 32)

FULL = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}
START = Schedule(**{p + n: v for p in ("", "dq_", "dkv_") for n, v in FULL.items()}, deterministic=True)


@pytest.mark.parametrize("piece", ["forward", "backward"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_gpu_space_has_legal_points_and_respects_lengths(piece, target):
    space = gpu_space(piece, replace(SHAPE, n_q=40), 2, Target.named(target), START)
    points = [p for p, _ in zip(space.points(), range(50), strict=False)]
    assert points
    for point in points:
        assert Schedule(**point)
        assert all(value <= 64 for name, value in point.items() if name.endswith("block_m") and value != 128)


def test_wide_heads_have_forms_that_spare_registers():
    """Without them nothing of 128 keys fits; special forms are choices of their own."""
    target = Target.named("sm_90")
    for head_dim in (64, 192):
        shape = replace(SHAPE, n_q=4096, n_k=4096, head_dim=head_dim, head_dim_v=head_dim)
        forms = special_forms(Spec(), shape, target, "backward")
        assert ("dkv_separate_sums" in forms) == ("dq_disable_licm" in forms) == (head_dim == 192)
        assert "dq_separate_sums" not in forms
    space = gpu_space("backward", shape, 2, target, START, forms=forms)
    point = space.start | dict(dkv_block_m=64, dkv_block_n=128, dkv_num_warps=8, dkv_num_stages=2)
    assert space.holds(point | {"dkv_separate_sums": True})
    assert not space.holds(point | {"dkv_separate_sums": False})


def test_pins_are_not_searched():
    space = gpu_space("forward", SHAPE, 2, Target.named("sm_90"), START, Schedule(block_m=32, num_stages=2))
    assert space.choices["block_m"] == (32,) and space.choices["num_stages"] == (2,)
    assert space.start["block_m"] == 32
    with pytest.raises(ScheduleError, match="no legal choice"):
        pins = Schedule(block_m=256, block_n=256, num_warps=2)
        gpu_space("forward", replace(SHAPE, n_q=4096, head_dim=256), 2, Target.named("sm_90"), START, pins)


MASKS = {"full": None, "lengths": "j < length[b] and i >= j", "documents": "doc[b, i] == doc[b, j]"}
TENSORS = {"lengths": [Tensor("length", 1, torch.int32)], "documents": [Tensor("doc", 2, torch.int32)]}
DECODING = Shape(4, 32, 8, 1, 65536, 128, 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pins", [None, Schedule(split=6), Schedule(pack=False, block_n=64)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_the_untuned_schedule_is_what_a_call_uses(mask, head_dim, pins, dtype, monkeypatch):
    """Also for decoding, where the model packs and splits: a record that beats something slower is worth nothing."""
    monkeypatch.setattr(choice.Target, "of_device", lambda device: Target.named("sm_90"))
    monkeypatch.setattr(choice, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(choice, "_records", lambda *given: {})
    spec = Spec(mask=MASKS[mask], tensors=TENSORS.get(mask, ()), schedule=pins)
    shape = replace(DECODING, head_dim=head_dim, head_dim_v=head_dim)
    job = Job(Part("", spec, shape, {}), "forward", dtype, find_target_device("H200", None), 0, 1.0)
    call = _empty_call(spec, shape, dtype, job.values)
    used, _ = choice.choose(call, facts(spec), "triton", pins or Schedule(), None)
    if (mask, pins, dtype) == ("full", None, torch.bfloat16):
        assert used.pack and used.split > 1
    space, start = job.space
    whole = Schedule(split=1, pack=False)  # what undecided means
    assert start == used and space.holds(space.start)
    assert Schedule(**space.start).over(start).over(whole) == used.over(whole)


def test_a_model_does_not_choose_an_order():
    """It doesn't see which programs run last; the default order stays, and no record says another."""
    spec, shape = Spec(mask="i >= j"), replace(SHAPE, n_q=4096, n_k=4096)
    for piece in ("forward", "backward"):
        job = Job(Part("", spec, shape, {}), piece, torch.bfloat16, find_target_device("H200", None), 0, 1.0)
        space, start = job.space
        assert not any(name.endswith(("order", "persistent")) for name in space.choices)
        assert {start.tile(kernel).order for kernel in KERNELS} == {"longest_first"}
    assert {"order", "persistent"} <= special_forms(spec, shape, Target.named("sm_90"), "forward").keys()


def test_a_split_of_the_models_is_kept_in_its_place():
    forms = {"split": (1, 2, 4, 8, 16, "stream"), "pack": (False, True)}
    start = replace(START, split=14, pack=True, block_m=16)
    space = gpu_space("forward", DECODING, 2, Target.named("sm_90"), start, None, forms)
    assert space.choices["split"] == (1, 2, 4, 8, 14, 16, "stream")
    assert space.start["split"] == 14 and space.start["pack"] is True and space.holds(space.start)
    assert space.around([space.start]).choices["split"] == (8, 14, 16)
    pinned = gpu_space("forward", DECODING, 2, Target.named("sm_90"), start, Schedule(split=3), forms)
    assert pinned.choices["split"] == (3,) and pinned.start["split"] == 3


def test_packed_rows_have_tiles_of_their_own():
    """One query of 32 heads that share keys is 32 rows; without packing it is one."""
    shape, forms = Shape(1, 32, 1, 1, 65536, 128, 128), {"split": (1, 8), "pack": (False, True)}
    start = replace(START, block_m=16, block_n=64, num_warps=4, pack=True, split=8)
    space = gpu_space("forward", shape, 2, Target.named("sm_90"), start, None, forms)
    assert space.choices["block_m"] == (16, 32)
    wide = {**space.start, "block_m": 32}
    assert space.holds(wide) and not space.holds({**wide, "pack": False})
    assert "a head alone has 1" in space.illegal({**wide, "pack": False})
    alone = gpu_space("forward", shape, 2, Target.named("sm_90"), start, None, {"split": (1, 8)})
    assert alone.choices["block_m"] == (16,)
    never = gpu_space("forward", shape, 2, Target.named("sm_90"), start, Schedule(pack=False), forms)
    assert never.choices["block_m"] == (16,)


def test_cpu_space_has_only_what_the_backend_uses():
    space = cpu_space("forward", replace(SHAPE, n_q=100), Schedule(block_m=128, block_n=1024))
    assert space.choices == {"block_m": (32, 64, 128), "block_n": (64, 128, 256, 1024)}
    assert cpu_space("backward", SHAPE, Schedule(block_m=128)).choices == {}
