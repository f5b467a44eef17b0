"""The tuner, against fake measurers and models, a fake worker process, and on the CPU backend end to end."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import attngen as ag
from attngen.analysis import facts
from attngen.backends.triton.modelled import Stretch
from attngen.backends.worker import Worker, WorkerDied
from attngen.cli.main import app
from attngen.errors import AttngenError, AttngenWarning, InputError, ScheduleError, StoreError
from attngen.language.expression import Tensor
from attngen.language.patterns import causal, window
from attngen.language.spec import Spec
from attngen.reference.oracle import oracle
from attngen.schedule import Schedule, Target, choice
from attngen.store import Shape, Store, time_text
from attngen.tuning import fleet
from attngen.tuning.attends import Part
from attngen.tuning.bench import Bench, Check, Inputs, WrongResult, plain
from attngen.tuning.captures import load_captures, make_captures, save_captures
from attngen.tuning.measure import Outcome, WorkerMeasurer, summarise
from attngen.tuning.model import GpuModel, ModelMeasurer, Rates, Resources, Uncompilable
from attngen.tuning.progress import shown
from attngen.tuning.search import Progress, Search
from attngen.tuning.sizes import offset_of, small_shape
from attngen.tuning.space import Space, cpu_space, gpu_space
from attngen.tuning.stopwatch import DeviceStopwatch
from attngen.tuning.study import PRUNED, Tried
from attngen.tuning.target_device import _empty_call, find_target_device
from attngen.tuning.trials import Trials
from attngen.tuning.tuner import Job

SPACE = Space({"m": (16, 32, 64, 128), "n": (16, 32, 64, 128), "w": (2, 4, 8)}, {"m": 64, "n": 64, "w": 4})
SHAPE = Shape(1, 4, 2, 256, 256, 32, 32)


def seconds(point: dict) -> float:
    """Best at m=128, n=32, w=8."""
    return 1e-3 * (1 + abs(point["m"] - 128) / 64 + abs(point["n"] - 32) / 32 + (8 - point["w"]) / 8)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeMeasurer:
    """Times by `seconds`, on a machine whose speed drifts; each measurement takes a second of the fake clock."""

    clock: Clock
    bad: dict[int, str] = field(default_factory=dict)  # place in the order of measurements -> status
    interrupt: int = -1
    drift: float = 0.0
    kind: str = "measured"
    spreads: list = field(default_factory=list)  # of the races of more than two, one after the other; then 1%
    calls: list = field(default_factory=list)

    def measure(self, points, patience=1.0):
        number = len(self.calls)
        self.calls.append(list(points))
        self.clock.now += 1.0
        if number == self.interrupt:
            raise KeyboardInterrupt
        speed = 1.0 + self.drift * number
        spread = self.spreads.pop(0) if self.spreads and len(points) > 2 else 0.01
        outcomes = [Outcome("ok", seconds(point) * speed, spread, 0.5) for point in points]
        if number in self.bad:
            outcomes[0] = Outcome(self.bad[number], reason="it was bad")
        return outcomes

    def close(self) -> None:
        pass


def search(count=20, storage=None, **options) -> tuple[Search, FakeMeasurer]:
    clock = options.pop("clock", Clock())
    measurer = FakeMeasurer(
        clock, **{n: options.pop(n) for n in ("bad", "interrupt", "drift", "spreads") if n in options}
    )
    trials = Trials(storage, "study", seed=0)
    return Search(options.pop("space", SPACE), measurer, trials, count, clock=clock, **options), measurer


def test_search_finds_the_best_of_a_small_space():
    searching, _ = search(count=48)
    result = searching.run()
    assert result.best.point == {"m": 128, "n": 32, "w": 8}
    assert result.progress.done == 48 and result.ended == "trials"


def test_search_never_tries_a_point_twice_and_ends_when_none_is_left():
    searching, measurer = search(count=1000)
    result = searching.run()
    assert result.ended == "exhausted" and result.progress.done == SPACE.size
    firsts = [json.dumps(call[0], sort_keys=True) for call in measurer.calls[:-1]]  # the last is the final race
    assert len(set(firsts)) == len(firsts) == SPACE.size


def test_better_than_chance():
    """With 16 of 48 trials the sampler and the neighbours of the best reach the best three."""
    searching, _ = search(count=16)
    best = searching.run().best
    assert seconds(best.point) <= sorted(seconds(p) for p in SPACE.points())[2]


def test_illegal_points_are_not_measured():
    space = replace(SPACE, illegal=lambda p: "too big" if p["m"] * p["n"] > 4096 else None)
    searching, measurer = search(count=100, space=space)
    result = searching.run()
    assert result.ended == "exhausted" and result.progress.done == len(list(space.points()))
    assert all(space.illegal(point) is None for call in measurer.calls for point in call)


def test_incumbent_and_start_come_first():
    incumbent = {"m": 16, "n": 16, "w": 2}
    searching, measurer = search(count=5, first=[incumbent])
    searching.run()
    assert measurer.calls[0] == [incumbent]
    assert measurer.calls[1][0] == SPACE.start


def test_candidates_race_against_the_best_so_far_so_drift_does_not_matter():
    searching, measurer = search(count=48, drift=0.05)  # at the end everything takes three times as long
    result = searching.run()
    assert result.best.point == {"m": 128, "n": 32, "w": 8}
    assert all(len(call) == 2 for call in measurer.calls[1:-1])


def test_failures_are_recorded_and_do_not_win():
    bad = {1: "timeout", 2: "crashed", 3: "memory", 4: "wrong", 5: "failed"}
    searching, _ = search(count=20, bad=bad)
    result = searching.run()
    assert result.progress.failed == 5 and result.progress.done == 20
    assert sorted(t.outcome.status for t in result.failures) == sorted(bad.values())
    assert result.best.outcome.ok


def test_when_everything_fails_there_is_no_best():
    searching, _ = search(count=6, bad=dict.fromkeys(range(100), "crashed"))
    result = searching.run()
    assert result.best is None and result.progress.failed == 6 and result.final == ()


def test_ctrl_c_keeps_what_was_learned(tmp_path):
    kept = []
    searching, _ = search(count=20, interrupt=7, storage=tmp_path / "a.journal", keep=kept.append)
    result = searching.run()
    assert result.ended == "interrupted" and result.progress.done == 7
    assert result.best.outcome.seconds == min(t.outcome.seconds for t in kept)
    again, _ = search(count=20, storage=tmp_path / "a.journal")
    result = again.run()
    assert result.progress.resumed == 7 and result.progress.done == 20 and result.ended == "trials"


def test_a_finished_study_is_not_searched_again(tmp_path):
    first = search(count=10, storage=tmp_path / "a.journal")[0].run()
    searching, measurer = search(count=10, storage=tmp_path / "a.journal")
    result = searching.run()
    assert result.progress.resumed == 10 and measurer.calls == []  # nor is its final race run again
    assert result.final == first.final and result.best == first.best


def test_deadline():
    searching, _ = search(count=40, deadline=8.5)
    result = searching.run()
    assert result.ended == "timeout" and result.progress.done == 9


def test_two_workers_share_a_study(tmp_path):
    """Like a fleet: each sees what the other did, and they stop at the common count."""
    one, _ = search(count=12, storage=tmp_path / "a.journal")
    two, _ = search(count=24, storage=tmp_path / "a.journal")
    one.run()
    result = two.run()
    assert result.progress.resumed == 12 and result.progress.done == 24


def test_a_storage_url(tmp_path):
    """As a fleet would use postgresql://; SQLite stands in for it here."""
    url = f"sqlite:///{tmp_path}/trials.db"
    search(count=4, storage=url)[0].run()
    assert search(count=6, storage=url)[0].run().progress.resumed == 4
    with pytest.raises(StoreError, match="nonsense"):
        Trials("nonsense://nowhere", "study")


def test_a_damaged_journal_is_kept_aside(tmp_path):
    path = tmp_path / "a.journal"
    search(count=5, storage=path)[0].run()
    path.write_bytes(b"\x00garbage\n" + path.read_bytes())
    with pytest.warns(AttngenWarning, match="cannot be read"):
        searching, _ = search(count=5, storage=path)
    assert searching.run().progress.resumed == 0
    assert len(list(tmp_path.glob("a.journal.damaged-*"))) == 1


def test_a_line_cut_short_by_a_kill_costs_one_trial(tmp_path, monkeypatch):
    path = tmp_path / "a.journal"
    search(count=5, storage=path)[0].run()
    lines = path.read_bytes().splitlines(keepends=True)
    told = [number for number, line in enumerate(lines) if b'"values":[' in line][4]  # the outcome of the fifth trial
    path.write_bytes(b"".join(lines[:told]) + lines[told][:-20])
    monkeypatch.setattr(fleet, "GONE", 0.0)
    searching, _ = search(count=8, storage=path)
    assert searching.run().progress.resumed == 4
    assert len(Trials(path, "study").history()) == 8


class FakeModel:
    def guess(self, point):
        return seconds(point)

    def bound(self, point):
        return 0.8 * seconds(point)

    def refuse(self, point):
        return "spills" if point["w"] == 2 else None


def finals(measurer: FakeMeasurer) -> int:
    return sum(len(points) > 2 for points in measurer.calls)


def test_a_noisy_final_race_is_run_again_and_the_quietest_counts():
    told: list[str] = []
    searching, measurer = search(count=6, spreads=[1.71, 0.2], watch=lambda progress: told.append(progress.now))
    result = searching.run()
    assert finals(measurer) == 2 and result.best.outcome.spread == 0.2 and not result.best.outcome.noisy
    assert "final race again: times 171% apart" in told
    searching, measurer = search(count=6, spreads=[0.9, 0.5, 0.8])
    result = searching.run()
    assert finals(measurer) == 3 and result.best.outcome.spread == 0.5 and result.best.outcome.noisy
    searching, measurer = search(count=6)
    assert not searching.run().best.outcome.noisy and finals(measurer) == 1
    searching, measurer = search(count=6, spreads=[0.9, 0.5], deadline=7.0)  # no time is left after the first
    assert searching.run().best.outcome.spread == 0.9 and finals(measurer) == 1


def test_the_bar_says_which_time_it_shows(capsys: pytest.CaptureFixture[str]):
    """So far by the races on the way; in the end what the record gets. What the model refused is told beside."""
    with shown(1, 12) as bars, bars.search("forward") as watch:
        searching, _ = search(count=12, drift=0.5, model=FakeModel(), watch=watch)
        result = searching.run()
    told = capsys.readouterr().err
    assert result.progress.kept == result.best and result.progress.pruned > 0
    assert f"kept {time_text(result.best.outcome.seconds)}" in told and f"pruned {result.progress.pruned}" in told
    assert "so far" not in told and "took" in told and "failed" not in told
    with shown(1, 4) as bars, bars.search("forward") as watch:
        watch(Progress(trials=4, done=2, failed=1, best=Tried({}, Outcome("ok", 0.193))))
    told = capsys.readouterr().err
    assert "2/4 so far 193 ms  failed 1 left" in told


def test_a_noisy_record_is_kept_with_a_warning(cache: Path, monkeypatch: pytest.MonkeyPatch):
    quiet = WorkerMeasurer.measure

    def measure(self, points, patience=1.0):
        return [replace(outcome, spread=1.71) for outcome in quiet(self, points, patience)]

    monkeypatch.setattr(WorkerMeasurer, "measure", measure)
    spec, options = ag.Spec(mask=ag.causal()), {"trials": 2, "pieces": ["forward"], "progress": False, "patience": 0.01}
    with pytest.warns(AttngenWarning, match="spread 171%, too noisy: the schedule may be no better than another"):
        report = ag.tune(spec, shapes=["B1 H2 N256 D32"], **options)
    (record,) = Store(cache / "records.db").records()
    assert record.noisy and record.spread == 1.71 and "spread 171%, too noisy" in str(report)
    q = torch.randn(1, 2, 256, 32)
    assert "measured record, exact, too noisy" in ag.compile(spec).explain(q, q, q)
    assert "spread 171%, too noisy" in CliRunner().invoke(app, ["db", "ls"]).output


def test_the_model_prunes_and_its_guesses_come_first():
    searching, measurer = search(count=40, model=FakeModel())
    result = searching.run()
    assert measurer.calls[1] == [{"m": 128, "n": 32, "w": 8}, SPACE.start]
    assert result.best.point == {"m": 128, "n": 32, "w": 8}
    assert result.ended == "exhausted" and result.progress.pruned > 20
    assert result.progress.done + result.progress.pruned == SPACE.size
    assert not any(point["w"] == 2 for call in measurer.calls for point in call)


def test_tightening_searches_near_the_best():
    narrow = SPACE.around([{"m": 128, "n": 32, "w": 8}, {"m": 128, "n": 16, "w": 8}])
    assert narrow.choices == {"m": (64, 128), "n": (16, 32, 64), "w": (4, 8)}
    assert narrow.holds(narrow.start)


def test_search_goes_on_after_tightening(tmp_path):
    searching, _ = search(count=46, storage=tmp_path / "a.journal")
    searching.trials.asking = 1e9  # as if the sampler had become slow
    result = searching.run()
    assert result.best.point == {"m": 128, "n": 32, "w": 8} and result.progress.done == 46
    assert len(Trials(tmp_path / "a.journal", "study").history()) == 46


def test_pruned_trials_are_kept_in_the_study():
    trials = Trials(None, "study")
    asked = trials.ask(SPACE)
    trials.tell(asked, Outcome(PRUNED, reason="spills"))
    trials.forget(trials.ask(SPACE))
    (tried,) = trials.history()
    assert tried.point == asked.point and tried.outcome.reason == "spills"


# Spaces ---------------------------------------------------------------------------------------------------------------

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


# The model ------------------------------------------------------------------------------------------------------------

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


# Captures -------------------------------------------------------------------------------------------------------------

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


# The bench: check and timing ------------------------------------------------------------------------------------------

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


# The worker process ---------------------------------------------------------------------------------------------------

FAKE_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    point = request.get("point") or {}
    what = point.get("do")
    if what == "hang":
        time.sleep(60)
    if what == "crash":
        print("boom: bad address", file=sys.stderr)
        os.abort()
    if what == "killed":
        os.kill(os.getpid(), 9)
    answer = {"status": "ok", "error": 0.25}
    if what in ("wrong", "memory", "failed"):
        answer = {"status": what, "reason": "said so", "error": 7.0}
    if request["op"] == "race":
        if any(p.get("do") == "late" for p in request["points"]):
            os.abort()
        answer = {"status": "ok", "times": [[p["t"]] * 5 for p in request["points"]]}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def measurer():
    worker = Worker({"op": "job"}, limit=1.0, command=[sys.executable, "-c", FAKE_WORKER])
    yield WorkerMeasurer(worker)
    worker.close()


GOOD = {"t": 1.0}


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("hang", "timeout"),
        ("crash", "crashed"),
        ("killed", "memory"),
        ("wrong", "wrong"),
        ("memory", "memory"),
        ("failed", "failed"),
        ("late", "crashed"),
    ],
)
def test_a_bad_candidate_costs_only_itself(measurer, what, status):
    assert measurer.measure([GOOD])[0].ok
    bad, good = measurer.measure([{"do": what, "t": 2.0}, GOOD], patience=0.2)
    assert bad.status == status and bad.reason and not bad.ok
    assert good == Outcome("ok", 1.0, 0.0, 0.25)
    assert measurer.measure([{"t": 3.0}, GOOD])[0].seconds == 3.0


def test_last_words_are_reported(measurer):
    (outcome,) = measurer.measure([{"do": "crash"}])
    assert "SIGABRT" in outcome.reason and "boom: bad address" in outcome.reason


def test_a_worker_that_cannot_start_ends_the_tuning():
    worker = Worker({}, command=[sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(AttngenError, match="no such thing"):
        worker.ask({"op": "prepare"})


def test_close_kills_a_hanging_worker():
    worker = Worker({"op": "job"}, limit=0.3, command=[sys.executable, "-c", FAKE_WORKER])
    worker.ask({"op": "x"})
    pid = worker._process.pid
    with pytest.raises(WorkerDied, match=r"0\.3 s"):
        worker.ask({"op": "prepare", "point": {"do": "hang"}})
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_real_worker_answers_errors_and_ends_with_its_tuner():
    process = subprocess.Popen(
        [sys.executable, "-m", "attngen.tuning.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    job = {"op": "job", "device": None}
    process.stdin.write(json.dumps(job) + "\n" + json.dumps({"op": "dance"}) + "\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"status": "ok"}
    answer = json.loads(process.stdout.readline())
    assert answer["status"] == "failed" and "dance" in answer["reason"]
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def test_tuning_is_imported_without_optuna():
    code = "import sys, attngen.tuning; print([m for m in ('optuna', 'sqlalchemy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# End to end -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch, request) -> Path:
    """A cache folder of its own; one thread, which a busy machine slows down less than several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ATTNGEN_DB", raising=False)
    return tmp_path


def test_tune_on_the_cpu(cache):
    import attngen as ag

    db = cache / "mine.db"
    spec = ag.Spec(mask=ag.causal() & ag.window(64))
    options = {"trials": 3, "db": db, "progress": False, "patience": 0.02}
    report = ag.tune(spec, shapes=["B1 H2 N256 D32"], **options)
    assert report.kind == "measured" and report.results
    records = {r.key.piece: r for r in Store(db).records()}
    assert set(records) == {tuned.piece for tuned in report.results}
    for one in records.values():
        assert one.kind == "measured" and one.seconds > 0 and one.error <= 1.0 and one.schedule
    again = ag.tune(spec, shapes=["B1 H2 N256 D32"], **options)
    assert all(tuned.result.progress.resumed == tuned.result.progress.done for tuned in again.results)
    assert "finished before, measured" in str(again) and again.records == report.records
    assert all(tuned.seconds == 0 for tuned in again.results)
    q, k, v = (torch.randn(1, 2, 256, 32) for _ in range(3))
    attention = ag.compile(spec, db=str(db))
    assert torch.allclose(attention(q, k, v).double(), ag.oracle(spec, q, k, v)[0], atol=1e-4)
    assert "measured record, exact" in attention.explain(q, k, v)


def test_tune_for_a_gpu_that_is_not_here(cache):
    import attngen as ag

    spec = ag.Spec(mask=ag.causal())
    report = ag.tune(
        spec, shapes=["B1 Hq8 Hkv2 N2048 D64"], target="H200", trials=3, pieces=["forward"], progress=False
    )
    (record,) = report.records
    assert (
        record.kind == "modelled" and record.key.device == "NVIDIA H200" and "modelled for NVIDIA H200" in str(report)
    )
    assert Store(cache / "records.db").records() == [record]


def test_ctrl_c_in_a_real_tuning(cache):
    """The whole command: SIGINT in the middle; it reports, and the database has the best so far."""
    code = (
        "import attngen as ag\n"
        "report = ag.tune(ag.Spec(mask=ag.causal()), shapes=['B1 H2 N256 D32'], trials=10**6, progress=False,"
        " patience=0.02)\nprint(report)\nprint('interrupted', report.interrupted)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    store = Store(cache / "records.db")
    end = time.monotonic() + 60
    while not (store.path.exists() and store.records()) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "interrupted True" in out or "running out of schedules" in out
    assert store.records()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shapes": []}, "shapes"),
        ({"trials": 0}, "trials"),
        ({"pieces": ["sideways"]}, "pieces"),
        ({"target": "H9000"}, "target"),
        ({"device": "toaster"}, "device"),
        ({"captures": {"slope": 1}}, "slope"),
    ],
)
def test_bad_arguments(cache, options, named):
    from attngen.tuning import tune

    with pytest.raises(InputError, match=named):
        tune(SPEC, **({"shapes": ["H1 N16 D16"], "progress": False} | options))


def test_rows_of_the_first_heads_read_their_part_of_captures():
    spec, shape = ag.Spec(mask=ag.causal() & ag.documents(), score=ag.alibi()), Shape(2, 8, 2, 1100, 1100, 16, 16)
    inputs = Inputs.make(spec, shape, torch.float32, torch.device("cpu"), None, 0, False)
    assert inputs.captures["slope"].shape == (8,)
    assert Check.rows(spec, inputs).error(ag.compile(spec)) <= 1.0
