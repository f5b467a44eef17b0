"""The bench: made-up captures, the check, and timing."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

import attngen as ag
from attngen.language.patterns import causal, window
from attngen.language.spec import Spec
from attngen.reference.oracle import oracle
from attngen.schedule import Schedule
from attngen.store import Shape
from attngen.tuning.bench import Bench, Check, Inputs, WrongResult, plain
from attngen.tuning.captures import load_captures, make_captures, save_captures
from attngen.tuning.measure import summarise
from attngen.tuning.sizes import offset_of, small_shape
from attngen.tuning.stopwatch import DeviceStopwatch
from tests.tuning.test_search import Clock

SHAPE = Shape(1, 4, 2, 256, 256, 32, 32)
LONG = Shape(1, 64, 8, 8192, 8192, 128, 128)

RICH = """param width: int
param cap: float
tensor doc: int[2]
tensor length: int[1]
tensor slope: float[1]
tensor bias: float[2]
tensor keep: bool[2]
mask: doc[b, i] == doc[b, j] and i - j < width and j < length[b] and keep[b, j]
score: cap * tanh(s / cap) + slope[h] * (j - i) + bias[h, i - j + 300]"""


def test_made_up_captures_fit_and_repeat(tmp_path):
    spec = Spec.from_text(RICH)
    made = make_captures(spec, SHAPE, seed=3)
    assert made["doc"].shape == (1, 256) and bool((made["doc"].diff(dim=-1) >= 0).all())
    assert made["slope"].shape == (4,) and made["width"] == 32 and made["length"].dtype == torch.int32
    q, k, v = (torch.randn(1, h, 256, 32) for h in (4, 2, 2))
    out, _ = oracle(spec, q, k, v, **made)
    assert bool(out.isfinite().all()) and float(out.abs().sum()) > 0
    again = make_captures(spec, SHAPE, seed=3, given={"width": 7})
    assert again.pop("width") == 7
    assert all(torch.equal(torch.as_tensor(again[n]), torch.as_tensor(made[n])) for n in again)
    path = save_captures(made | {"doc": made["doc"].to(torch.int64), "bias": made["bias"].bfloat16()}, tmp_path)
    loaded = load_captures(path)
    assert loaded["doc"].dtype == torch.int64 and torch.equal(loaded["doc"], made["doc"].long())
    assert loaded["bias"].dtype == torch.bfloat16 and loaded["cap"] == made["cap"]


SPEC = Spec(mask=causal() & window(100))


def right(schedule: Schedule):
    return lambda q, k, v, **captures: oracle(SPEC, q, k, v, **captures)[0].to(q.dtype)


def wrong(schedule: Schedule):
    """Loses the last key of the window, as a bad tile interval would."""
    bad = Spec(mask=causal() & window(99))
    return lambda q, k, v, **captures: oracle(bad, q, k, v, **captures)[0].to(q.dtype)


@pytest.mark.parametrize("piece", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_tells_right_from_wrong(piece, dtype):
    bench = Bench(SPEC, SHAPE, dtype, "cpu", piece, build=right)
    assert bench.prepare({"block_m": 64}) <= 1.0
    with pytest.raises(WrongResult) as caught:
        Bench(SPEC, SHAPE, dtype, "cpu", piece, build=wrong).prepare({"block_m": 64})
    assert caught.value.error > 1.0


def test_rows_at_full_length_are_checked_too(monkeypatch):
    monkeypatch.setattr("attngen.tuning.sizes.CHECK_LENGTH", 150)
    shape = replace(SHAPE, n_q=300, n_k=300)

    def wrong_when_long(schedule):
        return lambda q, k, v, **c: (right if q.shape[2] <= 150 else wrong)(schedule)(q, k, v, **c)

    with pytest.raises(WrongResult):
        Bench(SPEC, shape, torch.float32, "cpu", "forward", build=wrong_when_long).prepare({})
    assert Bench(SPEC, shape, torch.float32, "cpu", "forward", build=right).prepare({}) <= 1.0


def test_nan_is_wrong():
    with pytest.raises(WrongResult):
        Bench(SPEC, SHAPE, torch.float32, "cpu", "forward", build=lambda s: lambda q, k, v: q * float("nan")).prepare(
            {}
        )


def test_plain_agrees_with_the_oracle_in_float64():
    spec = Spec.from_text(RICH + "\ntensor sink: float[1]\nsink: sink[h]")
    captures = make_captures(spec, SHAPE)
    inputs = Inputs.make(spec, SHAPE, torch.float64, torch.device("cpu"), captures, 0, False)
    expected = oracle(spec, inputs.q, inputs.k, inputs.v, **captures)[0]
    assert torch.allclose(plain(spec, inputs.q, inputs.k, inputs.v, **captures)[0], expected, atol=1e-6)


def test_checks_are_small():
    small = small_shape(Shape(64, 64, 8, 10**6, 10**6, 128, 128))
    assert small.heads_q // small.heads_kv == 8 and small.n_q <= 1024 and small.batch <= 2
    many = small_shape(Shape(8, 128, 1, 4096, 4096, 128, 128))
    assert many.batch * many.heads_q * many.n_q * many.n_k <= 32e6
    assert offset_of(Shape(1, 1, 1, 1, 4096, 64, 64)) == 4095 and offset_of(LONG) == 0
    assert isinstance(Check.dense(SPEC, SHAPE, torch.float32, torch.device("cpu"), None, 0, False), Check)


def test_races_take_turns_and_respect_patience():
    clock, order = Clock(), []

    def build(schedule):
        cost = schedule.forward.block_m / 1000

        def attention(q, k, v, **captures):
            if ready:
                order.append(schedule.forward.block_m)
                clock.now += cost
            return right(schedule)(q, k, v)

        return attention

    ready: list = []
    bench = Bench(SPEC, Shape(1, 1, 1, 8, 8, 16, 16), torch.float32, "cpu", "forward", build=build, clock=clock)
    bench.prepare({"block_m": 16})
    bench.prepare({"block_m": 32})
    ready.append(True)
    times = bench.race([{"block_m": 16}, {"block_m": 32}], patience=1.0)
    assert set(order[2:]) == {16, 32} and order[2:6] == [16, 32, 32, 16]
    assert times[0] == pytest.approx([0.016] * len(times[0])) and times[1] == pytest.approx([0.032] * len(times[1]))
    assert 1.0 / 0.048 <= len(times[0]) <= 1.0 / 0.048 + 2
    assert len(bench.race([{"block_m": 16}], patience=0.05)[0]) == 5
    bench.prepare({"block_m": 64})
    assert [len(found) for found in bench.race([{"block_m": 64}, {"block_m": 16}], patience=0.05)] == [2, 5]
    assert [len(found) for found in bench.race([{"block_m": 64}], patience=0.005)] == [1]


class FakeGpu:
    """A GPU on the fake clock: the host issues work, the device does it in order; stands in for torch.cuda's events."""

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch):
        self.clock, self.free, gpu = clock, 0.0, self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.free, gpu.clock.now)

            def synchronize(self) -> None:
                gpu.clock.now = max(gpu.clock.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        def wait(device: torch.device | None = None) -> None:
            clock.now = max(clock.now, gpu.free)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", wait)

    def issue(self, host: float, device: float) -> None:
        """So long for the host; from then on, and after what came before, so long for the device."""
        self.clock.now += host
        self.free = max(self.free, self.clock.now) + device

    def zero_(self) -> None:
        """As the tensor that is written to flush the L2."""
        self.issue(2e-6, 65e-6)


@pytest.mark.parametrize("host", [10e-6, 100e-6, 900e-6])
def test_a_gpus_times_are_the_devices_however_long_the_host_takes_to_launch(host, monkeypatch):
    clock = Clock()
    gpu = FakeGpu(clock, monkeypatch)
    bench = Bench(SPEC, Shape(1, 1, 1, 8, 8, 16, 16), torch.float32, "cpu", "forward", build=right, clock=clock)
    bench.prepare({"block_m": 16})
    bench.device = torch.device("cuda")
    monkeypatch.setattr(torch, "empty", lambda *size, **given: gpu)
    monkeypatch.setattr(bench.inputs, "run", lambda attention: gpu.issue(host, 20e-6))
    (times,) = bench.race([{"block_m": 16}], patience=0.01)
    assert times == pytest.approx([20e-6] * len(times))


@pytest.mark.parametrize("host", [10e-6, 100e-6, 900e-6])
def test_the_stopwatch_of_a_gpu(host, monkeypatch):
    """The first run's launches are not known yet; the graph that a backward needs is no part of it."""
    clock = Clock()
    gpu = FakeGpu(clock, monkeypatch)
    monkeypatch.setattr(torch, "empty", lambda *size, **given: gpu)
    stopwatch = DeviceStopwatch(torch.device("cuda"), clock)

    def prepare() -> None:
        gpu.issue(1e-3, 1e-3)

    def run(given: None) -> None:
        gpu.issue(host, 20e-6)

    assert stopwatch(prepare, run) == pytest.approx(max(20e-6, host + 20e-6 - 65e-6))
    assert [stopwatch(prepare, run) for _ in range(3)] == pytest.approx([20e-6] * 3)


def test_candidates_that_wait_hold_no_graph():
    """40 candidates with a result of a gigabyte each would leave no memory for the others."""
    results: list[weakref.ref] = []

    def alive() -> int:
        gc.collect()
        return sum(result() is not None for result in results)

    def build(schedule):
        def attention(q, k, v, **captures):
            assert not racing or alive() == 0
            out = right(schedule)(q, k, v, **captures)
            results.append(weakref.ref(out))
            return out

        return attention

    racing: list = []
    bench = Bench(SPEC, Shape(1, 1, 1, 8, 8, 16, 16), torch.float32, "cpu", "backward", build=build)
    points = [{"dq_block_m": size} for size in (16, 32, 64)]
    for point in points:
        bench.prepare(point)
        assert alive() == 0
    racing.append(True)
    assert all(times for times in bench.race(points, patience=0.001))
    assert alive() == 0


def test_summary_is_robust_to_outliers():
    times = [1.0] * 15 + [9.0] * 2
    outcome = summarise(times, 0.3)
    assert outcome.seconds == 1.0 and outcome.spread == 0.0 and outcome.error == 0.3
    assert summarise([1.0], 0.0).spread == 0.0


def test_rows_of_the_first_heads_read_their_part_of_captures():
    spec, shape = ag.Spec(mask=ag.causal() & ag.documents(), score=ag.alibi()), Shape(2, 8, 2, 1100, 1100, 16, 16)
    inputs = Inputs.make(spec, shape, torch.float32, torch.device("cpu"), None, 0, False)
    assert inputs.captures["slope"].shape == (8,)
    assert Check.rows(spec, inputs).error(ag.compile(spec)) <= 1.0
