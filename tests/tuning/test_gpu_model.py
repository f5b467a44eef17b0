"""What the model of a GPU says of schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attngen.backends.triton.modelled import Stretch
from attngen.schedule import Target
from attngen.store import Shape
from attngen.tuning.model import GpuModel, ModelMeasurer, Rates, Resources, Uncompilable

RATES = Rates(790e12, 4.3e12, 3.7e12, 132)
LONG = Shape(1, 64, 8, 8192, 8192, 128, 128)
POINT = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}


def model(compiled=None, piece="forward", shape=LONG, **options) -> GpuModel:
    target = Target.named("sm_90")
    return GpuModel(piece, shape, 2, target, RATES, lambda m, n: shape.n_q * shape.n_k, compiled, **options)


def test_bound_and_guess_agree_with_arithmetic():
    operations = 4 * 64 * 8192 * 8192 * 128
    assert model().bound(POINT) == pytest.approx(0.9 * operations / 790e12)
    assert model(bounded=False).bound(POINT) == 0.0
    tflops = operations / model().guess(POINT) / 1e12
    assert 250 < tflops < 600  # what portable Triton reaches is about 400 to 490


def test_model_prefers_sensible_tiles():
    tiny = POINT | {"block_m": 16, "block_n": 16}
    assert model().guess(POINT) < model().guess(tiny)
    one_stage = POINT | {"num_stages": 1}
    assert model().guess(POINT) < model().guess(one_stage)


def test_model_wants_bytes_under_way_when_decoding():
    decode = model(shape=Shape(4, 32, 8, 1, 8192, 128, 128))
    deep = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 3}
    assert decode.guess(deep) < 0.5 * decode.guess(deep | {"block_n": 16, "num_stages": 1})


def test_model_knows_packed_rows_and_cut_keys():
    decode = model(shape=Shape(1, 64, 8, 1, 65536, 128, 128))
    point = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 3, "split": 1, "pack": False}
    packed, cut = point | {"pack": True}, point | {"pack": True, "split": 16}
    assert decode.bound(packed) == decode.bound(point)
    fewer = {
        **packed,
        "split": 2,
    }  # as many programs as without packing have at 64 heads, or fewer, and an eighth of the work
    assert decode.guess(cut) < 0.2 * decode.guess(packed) and decode.guess(cut) < decode.guess(fewer)
    assert decode.guess(cut) < decode.guess(point | {"split": 2})  # the same programs, which read keys eight times
    assert decode.guess(cut | {"split": 1000}) > decode.guess(cut)  # states to merge
    assert decode.guess(cut | {"split": "stream"}) == pytest.approx(decode.guess(cut), rel=0.5)
    rows = model(shape=Shape(1, 64, 8, 8, 65536, 128, 128))
    assert rows.guess(cut | {"block_m": 64}) < rows.guess(cut | {"block_m": 64, "pack": False})


def test_model_refuses_what_cannot_run_or_spills():
    used = Resources(168, 0, 100_000, 8)
    assert model(lambda p: {"": used}).refuse(POINT) is None
    assert "shared memory" in model(lambda p: {"": replace(used, shared=300_000)}).refuse(POINT)
    assert "spills" in model(lambda p: {"": replace(used, spills=400)}).refuse(POINT)
    assert "not one program" in model(lambda p: {"": replace(used, registers=255, num_warps=16)}).refuse(POINT)


def test_model_reads_machine_code_and_prunes_by_it():
    """Twice the cycles in the loops are twice the time; what is measured leaves out what is hopeless."""

    def loops(cycles):
        return Resources(168, 0, 100_000, 8, *[Stretch(cycles, cycles)] * 2, Stretch(0, 0))

    by_blocks = {64: loops(10_000), 32: loops(11_000), 16: loops(20_000)}  # far above what the cache needs
    points = [POINT | {"block_n": n} for n in by_blocks]
    compiled = lambda point: {"": by_blocks[point["block_n"]]}  # noqa: E731
    times = [model(compiled).estimate(point) for point in points]
    assert times[1] / times[0] == pytest.approx(2.2, rel=1e-2) and times[2] / times[0] == pytest.approx(8, rel=1e-2)
    assert all(model(compiled).refuse(point) is None for point in points)
    measuring = model(compiled, prunes=True)
    assert measuring.refuse(points[0]) is None
    assert "8.0 times the best" in measuring.refuse(points[2]) and "2.2 times" in measuring.refuse(points[1])
    masked = model(
        lambda p: {"": replace(loops(10_000), partial=Stretch(30_000, 30_000))},
        masked=lambda m, n: LONG.n_q * LONG.n_k / 2,
    )
    assert masked.estimate(POINT) / times[0] == pytest.approx(2, rel=1e-2)


def test_model_measurer_reports_what_does_not_compile():
    def broken(point):
        raise Uncompilable("does not compile: oh")

    (outcome,) = ModelMeasurer(model(broken)).measure([POINT])
    assert not outcome.ok and "oh" in outcome.reason
    (outcome,) = ModelMeasurer(model(lambda p: {"": Resources(168, 0, 100_000, 8)})).measure([POINT])
    assert outcome.ok and outcome.error == 0.0


def test_occupancy():
    target = Target.named("sm_90")
    assert Resources(128, 0, 0, 4).resident(target) == 4
    assert Resources(32, 0, 100_000, 4).resident(target) == 2
    assert Resources(16, 0, 0, 8).resident(target) == 8
