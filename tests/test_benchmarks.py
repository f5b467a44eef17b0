"""The benchmark harness with a fake clock: no test here depends on how fast this machine is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.expression import evaluate
from attngen.inputs import bind
from attngen.reference import dense_env
from benchmarks import measure, prepare, report, report_files, suite
from benchmarks.__main__ import main
from benchmarks.cases import BACKWARD, CASES, FORWARD, TRAINING, Case, Sizes, cases_of
from benchmarks.check import Reference, WrongResult
from benchmarks.measure import Context, clean
from benchmarks.patterns import PATTERNS
from benchmarks.peers import PEERS, Built, Unavailable
from benchmarks.seeds import KEY_SETS
from benchmarks.suite import Mixed, Results
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
    known = {*PEERS, *prepare.PLANNERS, "attngen-dense"}
    for case in cases:
        assert (
            case.suite == name
            and case.pattern in {**PATTERNS, **KEY_SETS}
            and set(case.peers) <= known
            and case.peers[0] == "attngen"
        )
        assert case.heads_q % case.heads_kv == 0 and hash(case) and json.dumps(measure.describe(case))
    chosen = cases_of(name, Sizes(small, cuda), ["flex"])
    assert {case.peers for case in chosen} == {("attngen", "flex")}


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
    monkeypatch.setattr("benchmarks.check.CHUNK_ELEMENTS", 2 * 40 * 7)
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
    timings, failed = race(candidates, HostStopwatch(clock), 5.0, (3, 4), clock)
    assert failed == {"c": "RuntimeError: gone"} and set(timings) == {"a", "b"}
    assert (timings["a"].median, timings["b"].median, timings["b"].runs) == (0.25, 0.5, 3)
    assert order[:6] == ["a", "b", "c", "b", "c", "a"]
    assert race({}, HostStopwatch(clock), clock=clock) == ({}, {})


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


def test_results_of_two_machines_do_not_mix(tmp_path: Path):
    run([tiny()], results(tmp_path), context(Clock()))
    with pytest.raises(Mixed, match=r"torch 0 \(now 1\)"):
        results(tmp_path, resume=True, torch="1")


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


@pytest.mark.parametrize(("pattern", "setting"), [("qk_sparse", ("kept", 0.5)), ("hash_sparse", ("buckets", 4))])
def test_sparse_systems_stand_against_dense_attention(tmp_path: Path, pattern: str, setting: tuple[str, Any]):
    peers = ("attngen", "attngen-dense", "quick")
    case = tiny(suite="seeds", direction=TRAINING, peers=peers, heads_kv=4)
    case = replace(case, pattern=pattern, settings=(setting,))
    kept = Results(tmp_path / "seeds.json", SETTING, False)
    where = replace(context(Clock()), stopwatch=HostStopwatch(), seconds=0.01, clock=time.perf_counter)
    suite.run([case], kept, where, 1e9, lambda text: None)
    assert {name: r["status"] for name, r in kept.of(case.id).items()} == dict.fromkeys(peers, "ok")
    assert kept.of(case.id)["attngen"]["best_peer"] in peers


def test_planning_refuses_what_does_not_fit():
    inputs = Inputs.make(tiny("causal window", heads_q=1, heads_kv=1, head_dim=1, n_q=2**21, n_k=2**21, batch=1), CPU)
    with pytest.raises(Unavailable, match="GiB"):
        prepare.plan_dense(inputs)


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
