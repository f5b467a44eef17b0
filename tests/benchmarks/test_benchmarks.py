"""The benchmark harness with a fake clock: no test here depends on how fast this machine is."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.language.call import bind
from attngen.language.programs import evaluate
from attngen.reference.dense import dense_env
from benchmarks import expected, measure, paper_tables, prepare, report, report_files, seeds, suite
from benchmarks.__main__ import main
from benchmarks.case import BACKWARD, FORWARD, TRAINING, Case, Sizes, System
from benchmarks.cases import CASES, cases_of, outwards
from benchmarks.check import Reference, WrongResult
from benchmarks.measure import Context, clean
from benchmarks.memory import peak_memory
from benchmarks.papers import FLASH, HYPER, PAPERS, SCFA
from benchmarks.patterns import PATTERNS
from benchmarks.peers import PEERS, Built, Unavailable, by_intervals, cudnn_flex, sdpa_backend
from benchmarks.seeds import KEY_SETS
from benchmarks.suite import DeviceLost, Mixed, Results
from benchmarks.timing import Candidate, HostStopwatch, race
from benchmarks.work import Inputs, Rates, work

CPU = torch.device("cpu")
SETTING = {"device": "a test", "torch": "0", "triton": "0", "size": "small"}


class Clock:
    """Stands still unless told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine handing tiny work to several threads takes longer than doing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_rates", lambda *a: Rates(flops=1e9, bytes=1e9, exps=None))


def tiny(
    pattern: str = "causal", direction: str = FORWARD, peers: tuple[str, ...] = ("attngen", "quick"), **changed: Any
) -> Case:
    settings = {"causal window": (("width", 9),), "window": (("width", 9),), "causal documents": (("documents", 5),)}
    settings["lengths"] = (("lengths", (3, 30)),)
    batch = 1 if pattern == "learned bias" else 2
    case = Case("dense", pattern, direction, batch, 4, 2, 40, 40, 16, "float32", peers, settings.get(pattern, ()))
    return replace(case, **changed)


def takes(clock: Clock, seconds: float, wrong: float = 0.0) -> Callable[[Inputs], Built]:
    """A peer that needs so long, by the fake clock, and half of it again for a backward; and may be wrong."""

    def advance(part: float) -> None:
        clock.now += part * seconds

    def build(inputs: Inputs) -> Built:
        good = PEERS["sdpa"](inputs)

        def run() -> torch.Tensor:
            advance(1.0)
            out = good.run() + wrong
            if out.requires_grad:
                out.register_hook(lambda grad: advance(0.5))
            return out

        return Built(run)

    return build


def refuses(inputs: Inputs) -> Built:
    raise Unavailable("it is not here")


def breaks(inputs: Inputs) -> Built:
    raise RuntimeError("no kernel in /some/folder/of/mine/kernel.py\nand more")


def context(clock: Clock, **peers: Any) -> Context:
    ours = {"attngen": takes(clock, 0.002), "quick": takes(clock, 0.003), "slow": takes(clock, 0.5), **peers}
    return Context(CPU, HostStopwatch(clock), clock, seconds=0.05, peers=ours)


def results(tmp_path: Path, resume: bool = False, **setting: Any) -> Results:
    return Results(tmp_path / "dense.json", {**SETTING, **setting}, resume)


def run(cases: list[Case], kept: Results, where: Context, budget: float = 1e9) -> tuple[bool, list[str]]:
    said: list[str] = []
    return suite.run(cases, kept, where, budget, said.append), said


# -- the cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("name", CASES)
def test_suites_are_data(name: str, small: bool, cuda: bool):
    cases = cases_of(name, Sizes(small, cuda))
    assert cases and len({case.id for case in cases}) == len(cases)
    for case in cases:
        systems = {system.name for system in case.systems}
        assert len(systems) == len(case.systems) and not systems & {*PEERS, *prepare.PLANNERS}
        assert {system.key_set for system in case.systems} <= set(KEY_SETS)
        assert case.suite == name and case.pattern in PATTERNS and case.peers[0] == "attngen"
        assert systems <= set(case.peers) <= {*PEERS, *prepare.PLANNERS, *systems}
        assert case.heads_q % case.heads_kv == 0 and hash(case) and json.dumps(measure.describe(case))
    for case, chosen in zip(cases, cases_of(name, Sizes(small, cuda), ["flex"]), strict=True):
        assert chosen.peers == ("attngen", *(system.name for system in case.systems), "flex")


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_every_row_of_a_paper_is_measured_somewhere(paper: Any):
    of_table = [c for n in CASES for c in cases_of(n, Sizes(small=False, cuda=True)) if c.table == paper.name]
    assert {case.column for case in of_table} == set(paper.columns)
    assert len({row.label for row in paper.rows}) == len(paper.rows)
    for row in paper.rows:
        assert set(row.printed) <= set(paper.columns) and (row.peer or row.printed)
        of_row = [c for c in of_table if row.part in ("", paper_tables.part_of(measure.describe(c)))]
        assert not row.peer or {c.column for c in of_row if row.peer in c.peers} == set(paper.columns)
    assert {system.name for case in of_table for system in case.systems} <= {row.peer for row in paper.rows}
    for cuda in (False, True):  # small sizes have the same columns, or some of them
        small = [c for n in CASES for c in cases_of(n, Sizes(True, cuda)) if c.table == paper.name]
        assert small and {case.column for case in small} <= set(paper.columns)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_counted_pairs_are_the_attended_ones(pattern: str):
    inputs = Inputs.make(tiny(pattern), CPU)
    spec = PATTERNS[pattern].spec
    call = bind(spec, inputs.q, inputs.k, inputs.v, captures=inputs.captures)
    mask = torch.as_tensor(evaluate(spec.mask, dense_env(call, torch.float64)))
    mask = mask.expand(inputs.case.batch, 4, 40, 40)
    done = work(inputs)
    assert done.pairs == int(mask.sum())
    assert done.flops == 4 * done.pairs * 16
    low, high = inputs.span
    keys = torch.arange(40)
    assert torch.equal((keys >= low[..., None]) & (keys < high[..., None]), mask[: low.shape[0], 0])
    if PATTERNS[pattern].flex_mask is not None:
        b, i = torch.arange(inputs.case.batch).view(-1, 1, 1), torch.arange(40).view(-1, 1)
        got = PATTERNS[pattern].flex_mask(inputs.captures)(b, 0, i, keys)
        assert torch.equal(got.expand(inputs.case.batch, 40, 40), mask[:, 0])


def test_work_and_bound():
    case = tiny("full", BACKWARD, batch=1)
    done = work(Inputs.make(case, CPU))
    assert (done.pairs, done.flops) == (4 * 1600, 10 * 4 * 1600 * 16)
    assert done.bytes == 4 * 4 * 16 * (4 * 40 + 2 * 40) + 4 * 4 * 40
    assert Rates(1.0, 1e12, None).bound(done) == (done.flops, "matrix")
    assert Rates(1e15, 1.0, 1.0).bound(done) == (done.bytes, "bytes")
    assert Rates(1e15, 1e15, 1.0).bound(done) == (done.exps, "exp")
    ragged = work(Inputs.make(tiny("lengths", n_q=1), CPU))
    assert ragged.pairs == 4 * 33 and ragged.bytes == 2 * 4 * 16 * (2 * 4 + 2 * 33) + 4 * 8 + 8


def test_combinations_go_outwards():
    assert outwards("ab", (1, 2)) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert outwards((1, 2, 3), (1, 2, 3))[:6] == [(1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (3, 1)]


def test_the_first_run_of_the_dense_suite_has_something_of_everything():
    cases, spent, first = cases_of("dense", Sizes(small=False, cuda=True)), 0.0, []
    for case in cases:
        spent += expected.seconds(case)
        first += [case] if spent <= expected.BUDGET else []
    assert len(cases) == 96 and 8 <= len(first) < 40
    headline = [case for case in first if (case.pattern, case.head_dim, case.heads_kv) == ("causal", 128, 8)]
    assert {case.n_k for case in headline} >= {2048, 32768} and headline == [*first[:2], *headline[2:]]
    for name in ("pattern", "direction", "heads_kv"):
        assert {getattr(case, name) for case in first} == {getattr(case, name) for case in cases}
    assert len({case.head_dim for case in first}) > 1
    assert [case.direction for case in cases] == 48 * [FORWARD, BACKWARD]


def test_how_many_runs_is_modelled_and_printed(capsys: pytest.CaptureFixture[str]):
    counted = expected.table()
    assert counted.keys() == CASES.keys() and min(counted.values()) >= 1
    page = (Path(report_files.__file__).parent / "results" / "README.md").read_text()
    for suite_, count in counted.items():
        (row,) = (line for line in page.splitlines() if line.startswith("| `") and f"`{suite_}`" in line.split("|")[1])
        names = row.split("|")[1].split(",")
        assert row.split("|")[2].split(",")[[f"`{suite_}`" in name for name in names].index(True)].strip() == str(count)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert expected.text() in capsys.readouterr().out
    case = cases_of("first_call", Sizes(small=False, cuda=True))[0]
    assert expected.runs([case] * 10, budget=expected.seconds(case)) == 10
    assert expected.runs([case] * 10, budget=5 * expected.seconds(case)) == 2


# -- the check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_right_results_pass_and_wrong_ones_do_not(pattern: str, direction: str):
    inputs = Inputs.make(tiny(pattern, direction), CPU)
    reference = Reference(inputs)
    for peer in ("attngen", "sdpa"):
        if peer == "attngen" or PATTERNS[pattern].sdpa:
            out, grads = measure.results(PEERS[peer](inputs).run, inputs)
            assert 0 < reference.error(out, grads) <= 1
    out, grads = measure.results(PEERS["attngen"](inputs).run, inputs)
    for name in grads:
        bad = grads[name].clone()
        bad.select(-1, 0).mul_(1.01)
        with pytest.raises(WrongResult, match=f"gradient of {name}"):
            reference.error(out, {**grads, name: bad})
    bad = out.clone()
    bad[-1, -1, -1, -1] += 1e-2
    with pytest.raises(WrongResult, match=r"out \(batch"):
        reference.error(bad, grads)
    with pytest.raises(WrongResult, match="inf"):
        reference.error(torch.full_like(out, torch.nan), grads)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cudnns_flex_gets_the_mask_as_intervals(pattern: str, direction: str):
    """Through functions that take what cuDNN's frontend documents: [0, F0) and [F1, F2) of each row, tensors [B, N, H, D]."""
    inputs = Inputs.make(tiny(pattern, direction), CPU)

    def plan_of(ends: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, build_backward: bool) -> Any:
        assert ends.shape[0] == 1 and ends.shape[1] % 2 == 1 and ends.dtype == torch.int32 and ends.is_contiguous()
        assert bool((ends.diff(dim=1) >= 0).all()) and int(ends.min()) >= 0 and int(ends.max()) <= k.shape[1]
        assert build_backward is (direction == BACKWARD)
        first, *others = ends[0].view(ends.shape[1], q.shape[0], 1, q.shape[1], 1)
        keys = torch.arange(k.shape[1])
        seen = keys < first
        for low, high in zip(others[::2], others[1::2], strict=True):
            seen = seen | ((keys >= low) & (keys < high))
        return seen

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask_plan: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask_plan, enable_gqa=True)
        return out.transpose(1, 2)

    if PATTERNS[pattern].flex_score is not None:
        with pytest.raises(Unavailable, match="no score function"):
            by_intervals(inputs, plan_of, attend)
        return
    built = by_intervals(inputs, plan_of, attend)
    assert 0 < Reference(inputs).error(*measure.results(built.run, inputs)) <= 1
    with pytest.raises(Unavailable, match="needs a GPU"):
        cudnn_flex(inputs)

    def refuses(*given: Any, **more: Any) -> Any:
        raise NotImplementedError("supports SM90")

    with pytest.raises(Unavailable, match="supports SM90"):
        by_intervals(inputs, refuses, attend)


def test_half_types_are_held_to_plain_pytorch():
    inputs = Inputs.make(tiny("alibi", BACKWARD, dtype="bfloat16"), CPU)
    reference = Reference(inputs)
    out, grads = measure.results(PEERS["attngen"](inputs).run, inputs)
    assert 0 < reference.error(out, grads) <= 1
    with pytest.raises(WrongResult):
        reference.error(out + 0.1, grads)


def test_many_chunks_of_rows(monkeypatch: pytest.MonkeyPatch):
    inputs = Inputs.make(tiny("causal documents", BACKWARD), CPU)
    whole = Reference(inputs)
    monkeypatch.setattr("attngen.tuning.check.CHUNK_ELEMENTS", 2 * 40 * 7)
    for one, other in zip(whole.want, Reference(inputs).want, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name])


# -- timing -----------------------------------------------------------------------------------------------------------


def test_race_takes_turns_and_drops_what_breaks():
    clock, order = Clock(), []

    def costs(name: str, seconds: float, broken: bool = False) -> Candidate:
        def work(_: Any) -> None:
            order.append(name)
            clock.now += seconds
            if broken and order.count(name) > 2:
                raise RuntimeError("gone")

        def prepare() -> None:
            clock.now += 1.0  # must not count

        return Candidate(prepare, work)

    candidates = {"a": costs("a", 0.25), "b": costs("b", 0.5), "c": costs("c", 9.0, broken=True)}
    found = race(candidates, HostStopwatch(clock), 5.0, (3, 4), clock)
    timings, failed = found.timings, found.failed
    assert failed == {"c": "RuntimeError: gone"} and set(timings) == {"a", "b"}
    assert (timings["a"].median, timings["b"].median, timings["b"].runs) == (0.25, 0.5, 3)
    assert (
        order[:9] == ["a", "b", "c"] * 3
    )  # to compile, to warm up for as long as it may take, and the first that counts
    assert order[9:] == ["b", "a", "b", "a"]  # back, and the next pair begins with another
    assert race({}, HostStopwatch(clock), clock=clock).times == {}


def test_what_warms_up_does_not_use_up_the_time():
    """Compiling in the first round takes longer than all the time there is."""
    clock = Clock()

    def run(_: Any) -> None:
        clock.now += 0.01 if clock.now else 100.0

    timings = race({"compiled": Candidate(lambda: None, run)}, HostStopwatch(clock), 1.0, (5, 60), clock).timings
    assert timings["compiled"].runs == 60 and timings["compiled"].p80 == pytest.approx(0.01)


@pytest.mark.parametrize("suite", ["dense", "overhead"])
def test_a_case_forgets_what_earlier_ones_compiled_but_not_its_own(monkeypatch: pytest.MonkeyPatch, suite: str):
    """A reset between the peers of a case would have the first of them compile again where it is timed."""
    import torch._dynamo

    done: list[str] = []

    def compiled(function: Any, mode: str | None, **given: Any) -> Any:
        done.append(f"compile {mode}")
        return lambda q, k, v, score_mod, block_mask, enable_gqa: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=enable_gqa
        )

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    where = Context(CPU, HostStopwatch(), time.perf_counter, seconds=0.0)
    action = measure.overhead if suite == "overhead" else measure.attention
    case = tiny(suite=suite, peers=("attngen", "flex", "flex-max-autotune"))
    for _ in range(2):
        assert [record.status for record in action(case, case.peers, where)] == ["ok"] * 3
    assert done == 2 * ["reset", "compile None", "compile max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("pattern", ["causal", "window", "alibi", "learned bias"])
def test_a_backend_without_groups_gets_repeated_heads(monkeypatch: pytest.MonkeyPatch, pattern: str, direction: str):
    """SDPA's efficient backend refuses enable_gqa. What is repeated is repeated inside the timing, and the record says so."""

    def efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
        assert q.shape[1] == k.shape[1] == v.shape[1] and not given.get("enable_gqa"), "no available kernel"
        return plain(q, k, v, **given)

    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", efficient)
    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", lambda backend: nullcontext())
    for heads_kv in (2, 4):
        inputs = Inputs.make(tiny(pattern, direction, heads_kv=heads_kv), CPU)
        built = sdpa_backend("EFFICIENT_ATTENTION", cuda_only=False)(inputs)
        assert 0 < Reference(inputs).error(*measure.results(built.run, inputs)) <= 1
        assert ("repeated for the group, inside the timing" in str(built.notes)) == (heads_kv == 2)
    grouped = sdpa_backend("FLASH_ATTENTION", cuda_only=False)(Inputs.make(tiny(pattern, direction), CPU))
    assert not grouped.notes
    with pytest.raises(AssertionError, match="no available kernel"):
        grouped.run()


# -- a suite ----------------------------------------------------------------------------------------------------------


def test_every_peer_has_a_record_whatever_came_of_it(tmp_path: Path):
    clock = Clock()
    where = context(clock, off=takes(clock, 0.001, wrong=0.1), absent=refuses, broken=breaks)
    case = tiny(peers=("attngen", "quick", "slow", "off", "absent", "broken"))
    finished, said = run([case], results(tmp_path), where)
    assert finished
    kept = results(tmp_path, resume=True).of(case.id)
    assert {name: r["status"] for name, r in kept.items()} == {
        "attngen": "ok", "quick": "ok", "slow": "ok", "off": "wrong", "absent": "not available", "broken": "failed",
    }  # fmt: skip
    assert kept["absent"]["reason"] == "it is not here"
    assert kept["broken"]["reason"] == "RuntimeError: no kernel in kernel.py and more"
    assert "out (batch" in kept["off"]["reason"] and kept["off"]["error"] > 1
    ours = kept["attngen"]
    assert ours["ratio"] == pytest.approx(1.5) and ours["best_peer"] == "quick"
    flops = 4 * 16 * 2 * 4 * 40 * 41 / 2
    assert ours["timing"]["median"] == pytest.approx(0.002) and ours["figure"] == pytest.approx(flops / 0.002 / 1e9)
    assert ours["bound_seconds"] == pytest.approx(flops / 1e9) and ours["bound_limit"] == "matrix"
    assert "running" not in json.loads((tmp_path / "dense.json").read_text())
    assert any("1.50x quick" in line for line in said)


def test_budget_and_resume(tmp_path: Path):
    clock = Clock()
    cases = [tiny(n_q=n, n_k=n, peers=("attngen", "slow")) for n in (8, 16, 24)]
    finished, said = run(cases, results(tmp_path), context(clock), budget=6.0)
    kept = json.loads((tmp_path / "dense.json").read_text())
    assert not finished and "--resume" in said[-1] and {r["case"] for r in kept["records"]} == {cases[0].id}
    measured = []
    while not finished:
        where = context(clock)
        finished, said = run(cases, results(tmp_path, resume=True), where, budget=6.0)
        measured.append([line for line in said if line.startswith("[")])
    assert [len(lines) for lines in measured] == [1, 1]
    assert all(len(results(tmp_path, resume=True).of(case.id)) == 2 for case in cases)
    assert run(cases, results(tmp_path, resume=True), context(clock)) == (True, [])
    assert results(tmp_path).data["records"] == []  # without --resume it starts over


def test_a_case_that_compiles_long_is_not_begun_at_the_end(tmp_path: Path):
    """It would end beyond the budget, though no case took so long before."""
    clock = Clock()
    quick = ("attngen", "quick")
    cases = [tiny(n_q=n, n_k=n, peers=quick) for n in (8, 16, 24)]
    cases[2] = replace(cases[2], peers=(*quick, "flex-max-autotune"))
    where = context(clock, **{"flex-max-autotune": takes(clock, 0.1)})
    long, short = (expected.seconds(case, where.seconds) for case in (cases[2], cases[0]))
    begun = clock.now
    assert run(cases[:1], results(tmp_path), where)[0]
    each = clock.now - begun
    assert not run(cases, results(tmp_path), where, budget=(1.9 + long / short) * each)[0]
    assert not results(tmp_path, resume=True).of(cases[2].id) and results(tmp_path, resume=True).of(cases[1].id)
    assert run(cases, results(tmp_path), where, budget=(2.1 + long / short) * each)[0]


def test_a_new_peer_is_measured_beside_the_old_ones(tmp_path: Path):
    clock = Clock()
    run([tiny(peers=("attngen", "off"))], results(tmp_path), context(clock, off=takes(clock, 1.0, wrong=1.0)))
    built = []

    def counted(name: str) -> Any:
        return lambda inputs: (built.append(name), takes(clock, 0.004)(inputs))[1]

    where = context(clock, attngen=counted("attngen"), quick=counted("quick"), off=counted("off"))
    run([tiny(peers=("attngen", "off", "quick"))], results(tmp_path, resume=True), where)
    assert built == ["attngen", "quick"]  # the wrong one is not tried again


def test_a_process_that_died_blames_the_peer_it_ran(tmp_path: Path):
    clock = Clock()

    def dies(inputs: Inputs) -> Built:
        raise KeyboardInterrupt

    case = tiny(peers=("attngen", "quick", "dies"))
    with pytest.raises(KeyboardInterrupt):
        run([case], results(tmp_path), context(clock, dies=dies))
    with pytest.raises(KeyboardInterrupt):  # once may have been a time limit
        run([case], results(tmp_path, resume=True), context(clock, dies=dies))
    finished, _ = run([case], results(tmp_path, resume=True), context(clock, dies=dies))
    kept = results(tmp_path, resume=True).of(case.id)
    assert finished and kept["dies"]["status"] == "failed" and "killed" in kept["dies"]["reason"]
    assert kept["attngen"]["status"] == kept["quick"]["status"] == "ok"
    assert not {"running", "ended"} & set(json.loads((tmp_path / "dense.json").read_text()))


def test_a_lost_device_blames_the_first_peer_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock, lost = Clock(), []

    def kills(inputs: Inputs) -> Built:
        lost.append(True)
        raise RuntimeError("an illegal memory access")

    def answers(device: Any) -> None:
        if lost:
            raise RuntimeError("an illegal memory access")

    def after(inputs: Inputs) -> Built:
        answers(CPU)
        return takes(clock, 0.002)(inputs)

    monkeypatch.setattr(measure, "synchronize", answers)
    cases = [tiny(n_q=n, n_k=n, peers=("attngen", "kills", "after")) for n in (8, 16)]
    with pytest.raises(DeviceLost, match="--resume"):
        run(cases, results(tmp_path), context(clock, kills=kills, after=after))
    kept = results(tmp_path, resume=True)
    assert {name: r["status"] for name, r in kept.of(cases[0].id).items()} == {"attngen": "ok", "kills": "failed"}
    assert not kept.of(cases[1].id)
    lost.clear()
    assert run(cases[:1], kept, context(clock, after=after))[0]
    assert kept.of(cases[0].id)["after"]["status"] == "ok"


def test_results_of_two_machines_do_not_mix(tmp_path: Path):
    run([tiny()], results(tmp_path), context(Clock()))
    with pytest.raises(Mixed, match=r"torch 0 \(now 1\)"):
        results(tmp_path, resume=True, torch="1")


def test_machines_may_differ_in_their_drivers(tmp_path: Path):
    for driver in ("580.1", "580.2", "580.1"):
        run([tiny()], results(tmp_path, resume=True, driver=driver), context(Clock()))
    assert results(tmp_path, resume=True, driver="580.2").data["setting"]["driver"] == "580.1, 580.2"


def test_how_it_stands_in_a_line(tmp_path: Path):
    clock, kept = Clock(), results(tmp_path)
    cases = [tiny(n_q=n, n_k=n, peers=("attngen", "slow", "off")) for n in (8, 16, 24)]
    run(cases[:2], kept, context(clock, off=takes(clock, 0.001, wrong=0.1)))
    said = suite.so_far(cases, kept)
    assert said.startswith(
        "2 of 3 cases, attngen 250.00x the best peer's speed (250.00 .. 250.00); 2 NOT ok: off wrong in "
    )


def test_a_broken_reference_fails_the_case_not_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_memory(inputs: Inputs) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measure, "Reference", no_memory)
    finished, _ = run([tiny()], results(tmp_path), context(Clock()))
    assert finished and {r["status"] for r in results(tmp_path, True).data["records"]} == {"failed"}


@pytest.mark.parametrize(("direction", "seconds"), [(FORWARD, 0.002), (BACKWARD, 0.001), (TRAINING, 0.003)])
def test_the_backward_is_timed_without_its_forward(tmp_path: Path, direction: str, seconds: float):
    case = tiny(direction=direction)
    run([case], results(tmp_path), context(Clock()))
    timing = results(tmp_path, True).of(case.id)["attngen"]["timing"]
    assert timing["median"] == pytest.approx(seconds)


# -- other suites -----------------------------------------------------------------------------------------------------


def test_overhead_counts_calls(tmp_path: Path):
    clock = Clock()
    case = tiny(suite="overhead")
    run([case], Results(tmp_path / "overhead.json", SETTING, False), context(clock))
    record = Results(tmp_path / "overhead.json", SETTING, True).of(case.id)["quick"]
    assert record["figure"] == pytest.approx(3000.0) and record["unit"] == "us"


@pytest.mark.parametrize("pattern", ["causal window", "causal documents"])
def test_planning(tmp_path: Path, pattern: str):
    case = tiny(pattern, "plan", suite="planning", n_q=256, n_k=256, batch=1, peers=("attngen", "dense-mask"))
    kept = Results(tmp_path / "planning.json", SETTING, False)
    where = Context(CPU, HostStopwatch(), Clock(), seconds=0.01)
    suite.run([case], kept, where, 1e9, lambda text: None)
    assert {name: r["status"] for name, r in kept.of(case.id).items()} == dict.fromkeys(case.peers, "ok")


SETTINGS: dict[str, dict[str, Any]] = {
    "qk_sparse": {"dropped": 50},
    "hash_sparse": {"buckets": 4},
    "hash_sparse_hashing": {"buckets": 4},
    "hyper": {"block": 64, "samples": 32, "min_len": 256},
    "butterfly": {},
    "vertical_slash": {"budget": 256},
    "adaptive": {"budget": 256},
    "sparse_k": {"k": 6, "window": 4, "incremental": True},
    "graph": {"degree": 8},
    "shared_prefix": {"suffix": 8},
}


def beside_dense(key_set: str, **changed: Any) -> Case:
    """The key set beside dense attention, a few hundred keys."""
    system = System("it", key_set, tuple(SETTINGS[key_set].items()))
    case = tiny("full" if key_set in ("graph", "shared_prefix") else "causal", TRAINING, ("attngen", "it", "sdpa"))
    rows = {"n_q": 1, "direction": FORWARD} if key_set == "shared_prefix" else {"n_q": 200}
    return replace(case, suite="seeds", systems=(system,), **{"n_k": 200, "batch": 2, **rows, **changed})


@pytest.mark.parametrize("key_set", KEY_SETS)
def test_sparse_systems_stand_against_dense_attention(tmp_path: Path, key_set: str):
    case = beside_dense(key_set)
    kept = Results(tmp_path / "seeds.json", SETTING, False)
    where = Context(CPU, HostStopwatch(), time.perf_counter, seconds=0.01)
    suite.run([case], kept, where, 1e9, lambda text: None)
    records = kept.of(case.id)
    assert {name: r["status"] for name, r in records.items()} == dict.fromkeys(case.peers, "ok"), records
    assert records["it"]["best_peer"] in ("attngen", "sdpa") and records["attngen"]["best_peer"] == "sdpa"
    assert records["it"]["unit"] == "ms" and "bound_fraction" not in records["it"]
    notes = records["it"]["notes"]
    assert {name: notes[name] for name in SETTINGS[key_set]} == SETTINGS[key_set]
    assert notes["pieces"] and all(isinstance(piece["schedule"], dict) and piece["origin"] for piece in notes["pieces"])


@pytest.mark.parametrize(("dtype", "relative"), [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("key_set", KEY_SETS)
def test_a_wrong_sparse_system_is_found(monkeypatch: pytest.MonkeyPatch, key_set: str, dtype: str, relative: float):
    """One that is wrong in that dtype only: a case in bfloat16 is checked in both."""
    seeds._checked.cache_clear()
    case, compiled = beside_dense(key_set, dtype="bfloat16"), ag.compile
    assert 0 < seeds.check(case.systems[0], case, CPU) < 1

    def off(spec: ag.Spec) -> Any:
        attn = compiled(spec)
        return lambda q, *a, **c: attn(q, *a, **c) * (1 + relative * (q.dtype == getattr(torch, dtype)))

    seeds._checked.cache_clear()
    monkeypatch.setattr(seeds.ag, "compile", off)
    with pytest.raises(WrongResult, match=f"out of it at N 200 in {dtype}"):
        seeds.check(case.systems[0], case, CPU)
    seeds._checked.cache_clear()


def test_what_is_no_number_at_full_length_is_wrong():
    seeds.check_finite(torch.ones(3), {"q": torch.ones(3)})
    with pytest.raises(WrongResult, match="q at full length"):
        seeds.check_finite(torch.ones(3), {"q": torch.tensor([1.0, torch.nan])})


def test_the_graph_has_half_of_its_edges_near():
    case = beside_dense("graph", n_q=100, n_k=100)
    captures = seeds.graph(System("it", "graph", (("degree", 16),)), Inputs.make(case, CPU)).call()
    rows = torch.repeat_interleave(torch.arange(100), captures["crow"].diff())
    inner = (rows > 40) & (rows < 60)  # whose neighbours are all there
    distance = (captures["col"] - rows)[inner]
    assert len(distance) == 19 * 16 and int(((distance >= -4) & (distance < 4)).sum()) >= 19 * 8
    assert {-12, 12, -20, 20} <= set(distance.tolist())


def test_planning_refuses_what_does_not_fit():
    inputs = Inputs.make(tiny("causal window", heads_q=1, heads_kv=1, head_dim=1, n_q=2**21, n_k=2**21, batch=1), CPU)
    with pytest.raises(Unavailable, match="GiB"):
        prepare.plan_dense(inputs)


def peak_of_planning(pattern: str, n: int) -> int | None:
    plan = prepare.plan_flex(False)(Inputs.make(tiny(pattern, batch=1, n_q=n, n_k=n, head_dim=1), CPU))
    plan()
    return peak_memory(plan, CPU)


@pytest.mark.parametrize(
    "pattern", [name for name, pattern in PATTERNS.items() if pattern.flex_mask and not pattern.learned]
)
def test_planning_counts_what_create_block_mask_holds(monkeypatch: pytest.MonkeyPatch, pattern: str):
    """i - j, or the sum of a block's bools, is an int64 for each pair: at 131,072 that is 128 GiB."""
    n = 2048
    inputs = Inputs.make(tiny(pattern, batch=1, n_q=n, n_k=n, head_dim=1), CPU)
    # In a process of its own: what ran before in this one would count.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as new:
        peak = new.submit(peak_of_planning, pattern, n).result()
    if peak is None:
        pytest.skip("this system does not tell a process's peak")
    assert 5 * n * n < peak < 1.25 * prepare.UNCOMPILED * n * n
    monkeypatch.setattr(prepare.os, "sysconf", lambda name: n if name == "SC_PAGE_SIZE" else 9 * n)
    with pytest.raises(Unavailable, match="GiB"):
        prepare.plan_flex(False)(inputs)
    prepare.plan_flex(True)(inputs)


def test_first_call_in_new_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Done:
        returncode, stdout, stderr = 0, json.dumps({"seconds": 2.0, "notes": {}}), ""

    commands = []
    monkeypatch.setattr(prepare.subprocess, "run", lambda command, **given: (commands.append(given["env"]), Done())[1])
    case = tiny(suite="first_call", peers=("attngen", "flex"))
    kept = Results(tmp_path / "first_call.json", SETTING, False)
    suite.run([case], kept, context(Clock()), 1e9, lambda text: None)
    assert kept.of(case.id)["attngen"]["figure"] == 2.0 and len(commands) == 4
    assert len({command["TRITON_CACHE_DIR"] for command in commands}) == 4  # each with empty caches


def test_a_peer_of_another_suite_is_listed_as_that(tmp_path: Path):
    for name, peer in (("first_call", "sdpa"), ("planning", "sdpa"), ("dense", "dense-mask")):
        case = tiny("full", "import" if name == "first_call" else FORWARD, suite=name, peers=(peer,))
        kept = Results(tmp_path / f"{name}.json", SETTING, False)
        suite.run([case], kept, context(Clock()), 1e9, lambda text: None)
        assert kept.of(case.id)[peer]["reason"] == "it has no part in this suite"


def test_first_calls_child():
    (case,) = (c for c in cases_of("first_call", Sizes(True, False)) if c.direction == FORWARD)
    answer = prepare.child({"case": case.id, "peer": "attngen", "device": "cpu", "small": True})
    assert answer["seconds"] > 0


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    clock = Clock()
    where = context(clock, off=takes(clock, 0.001, wrong=0.1))
    cases = [
        tiny(p, n_q=n, n_k=n, peers=("attngen", "quick", "slow", "off")) for p in ("causal", "full") for n in (16, 32)
    ]
    run(cases, results(tmp_path), where)
    kept = Results(tmp_path / "windows.json", SETTING, False)
    suite.run([tiny("window", suite="windows")], kept, where, 1e9, lambda text: None)
    yield tmp_path


def test_tables_and_charts_come_from_the_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert report_files.main([str(folder)]) == 0
    assert capsys.readouterr().out.split() == ["dense.png", "windows.png", "README.md"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("dense.png", "windows.png"))
    page = (folder / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| causal forward Hq4 Hkv2 D16 float32 B2 N16")]
    assert len(rows) == 1 and "| attngen | 2 ms (2 ms .. 2 ms) |" in rows[0] and "| 1.50 (quick) |" in rows[0]
    assert "- off wrong: out (batch" in page and "device a test" in page
    assert "|  | slow | 500 ms" in page


def test_tables_have_the_lengths_of_a_group_together():
    """Whatever the order in which they were measured."""
    cases = [
        tiny(p, n_q=n, n_k=n) for n, p in ((32, "full"), (16, "causal"), (8, "full"), (64, "causal"), (16, "full"))
    ]
    records = [measure.Record(case.id, "attngen", "ok", described=measure.describe(case)).to_json() for case in cases]
    grouped = report_files.by_case({"records": records})
    assert list(grouped) == [cases[place].id for place in (2, 4, 0, 1, 3)]


def of_paper(paper: Any, column: str, *systems: System, **changed: Any) -> Case:
    peers = ("attngen", *(system.name for system in systems), "quick")
    case = tiny(peers=peers, suite="seeds", systems=systems, table=paper.name, column=column, direction=TRAINING)
    return replace(case, **changed)


def cells_of(page: str, label: str) -> list[str]:
    """The row's cells after its label. There must be one such row."""
    rows = [line for line in page.splitlines() if line.startswith(f"| {label} |")]
    assert len(rows) == 1, page
    return [cell.strip() for cell in rows[0].split("|")[2:-1]]


def test_paper_tables_stand_beside_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    seconds = {"hash nb=16": 0.0005, "drop 50%": 0.001, "butterfly": 0.004}
    monkeypatch.setattr(seeds, "check", lambda system, case, device: 0.5)
    made = lambda system, inputs: (takes(clock, seconds[system.name])(inputs).run, inputs, {"size": 7})  # noqa: E731
    monkeypatch.setattr(seeds, "build", made)
    fast, drop, broken = (System(name, "hash_sparse") for name in ("hash nb=16", "drop 50%", "hash nb=4"))
    cases = [
        of_paper(SCFA, "32k", fast, drop, broken),
        of_paper(SCFA, "8k", fast, n_q=20, n_k=20),
        of_paper(FLASH, "4k", System("butterfly", "butterfly"), pattern="full"),
    ]
    kept = Results(tmp_path / "seeds.json", SETTING, False)
    assert suite.run(cases, kept, context(clock), 1e9, lambda text: None)
    records = json.loads((tmp_path / "seeds.json").read_text())["records"]
    (memory,) = (r for r in records if (r["peer"], r["described"]["column"]) == ("attngen", "4k"))
    memory["notes"] = {"peak bytes": 836_000_000}
    (tmp_path / "seeds.json").write_text(json.dumps({**kept.data, "records": records}))
    assert [path.name for path in report_files.write(tmp_path)] == ["seeds.png", "README.md"]
    page = (tmp_path / "README.md").read_text()
    tables = {
        paper.name: paper_tables.table(paper, cells, "a test, small sizes")
        for paper, cells in paper_tables.papers_of(records)
    }
    assert list(tables) == ["SCFA", "FlashAttention"] and all(table in page for table in tables.values())
    # With the backward a run takes 1.5 times its seconds above. What is printed is quoted with its machine, whole.
    scfa, flash = tables.values()
    assert cells_of(scfa, "") == ["8k", "16k", "32k"]
    assert cells_of(scfa, "measured on a test, small sizes:")[1:] == ["not measured", "B2 Hq4 Hkv2 d16 N40 float32"]
    assert cells_of(scfa, "dense") == ["3 ms", "–", "3 ms"]
    assert cells_of(scfa, "*dense (printed, A100-40GB)*") == ["", "", "*about 1008 ms*"]
    assert cells_of(scfa, "hash, nb 16") == ["750 us", "–", "750 us"]
    assert cells_of(scfa, "hash, nb 16, over the best dense") == ["4.00x attngen", "–", "4.00x attngen"]
    assert cells_of(scfa, "hash, nb 4") == ["–", "–", "failed"]
    assert cells_of(scfa, "*training step (printed, A100-40GB)*") == ["*2.0x*", "*3.3x*", ""]
    assert "SDPA cuDNN" not in scfa and "| *hash, nb 64 (printed, A100-40GB)* |  |  | *290 ms* |" in scfa
    assert cells_of(flash, "block-sparse, butterfly") == ["–", "–", "6 ms", "–", "–"]
    assert cells_of(flash, "memory, dense") == ["–", "–", "836 MB", "–", "–"]
    assert cells_of(flash, "memory, block-sparse") == ["–", "–", "not measured", "–", "–"]
    assert "- hash nb=4 failed: KeyError" in page and "size 7" in page
    assert [title for title, _, _ in paper_tables.panels(records)] == [
        "SCFA: causal training",
        "FlashAttention: full training",
    ]


def test_speed_ups_are_over_the_dense_attention_of_the_same_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(seeds, "check", lambda system, case, device: 0.5)
    monkeypatch.setattr(seeds, "build", lambda system, inputs: (takes(clock, 0.001)(inputs).run, inputs, {}))
    system, kept = System("hyper", "hyper"), Results(tmp_path / "seeds.json", SETTING, False)
    cases = [of_paper(HYPER, "131k", system, direction=direction) for direction in (FORWARD, TRAINING)]
    slower = context(clock, attngen=lambda inputs: takes(clock, 0.004 if inputs.leaves else 0.002)(inputs))
    assert suite.run(cases, kept, slower, 1e9, lambda text: None)
    ((paper, cells),) = paper_tables.papers_of(kept.data["records"])
    table = paper_tables.table(paper, cells, "a test")
    assert cells_of(table, "causal, forward, over attngen's dense") == ["2.00x"]
    assert cells_of(table, "causal, forward and backward, over attngen's dense") == ["4.00x"]
    assert cells_of(table, "causal, forward and backward, over the best dense") == ["3.00x quick"]
    assert "not causal" not in table and "| *5x* |" in table


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    small = tiny(peers=("attngen", "sdpa"))
    monkeypatch.setitem(CASES, "dense", lambda sizes: [small])
    arguments = [
        "dense",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--seconds",
        "0.01",
        "--peers",
        "sdpa",
        "sdpa-cudnn",
    ]
    assert main(arguments) == 0 and main([*arguments, "--resume"]) == 0
    kept = json.loads((tmp_path / "dense.json").read_text())
    assert {r["peer"]: r["status"] for r in kept["records"]} == {
        "attngen": "ok",
        "sdpa": "ok",
        "sdpa-cudnn": "not available",
    }
    ours = next(r for r in kept["records"] if r["peer"] == "attngen")
    assert "model's choice" in ours["notes"]["origin"] and isinstance(ours["notes"]["schedule"], dict)
    assert {"device", "driver", "torch", "triton", "attngen", "commit", "generator"} <= set(kept["setting"])
    assert str(Path.cwd()) not in json.dumps(kept)
    assert (tmp_path / "dense.png").exists() and (tmp_path / "README.md").exists()
    monkeypatch.setattr(report, "setting", lambda device: SETTING)
    assert main([*arguments, "--resume"]) == 2
    with pytest.raises(SystemExit):
        main(["nothing"])


def test_no_path_gets_into_a_reason():
    assert clean("File '/a/b.c/d/e.py', line 3:\n x/y = 1/2") == "File 'e.py', line 3: x/y = 1/2"


def test_a_spec_of_each_pattern_has_a_name_of_its_own():
    keys = [pattern.spec.key for pattern in PATTERNS.values()]
    assert len(set(keys)) == len(keys) and all(isinstance(p.spec, ag.Spec) for p in PATTERNS.values())
