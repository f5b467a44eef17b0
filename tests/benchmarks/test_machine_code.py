"""attngen's machine code beside FlexAttention's: what is rendered, counted and said."""

import json

import pytest
import torch
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
from typer.testing import CliRunner

from attngen.backends.triton.machine_code import Loop, MachineCode
from attngen.language.schedule import Tile
from attngen.schedule import Target
from attngen.schedule.shipped import form_of, read_tiles, tile_of, write_tiles
from benchmarks import beside_flex, flex_kernels, public_choices
from benchmarks.beside_flex import Part, Side
from benchmarks.flex_kernels import Filling, Problem
from benchmarks.machine_code import SPECS, app

SM_90, SM_80 = Target.named("sm_90"), Target.named("sm_80")


def causal(b, h, i, j):
    return i >= j


def biased(s, b, h, i, j, bias):
    return s + bias[h, i, j]


def test_default_tiles_are_those_of_the_installed_torch():
    heuristic = CUDAConfigHeuristic()
    for target, table in (
        (SM_90, heuristic.h100_default_flex_config),
        (SM_80, heuristic.a100_default_flex_config),
    ):
        for d in (64, 128, 256):
            found, expected = flex_kernels.default("forward", d, target), table[torch.bfloat16, d]
            assert found.blocks == {"BLOCK_M": expected.block_m, "BLOCK_N": expected.block_n}
            assert (found.num_stages, found.num_warps) == (expected.num_stages, expected.num_warps)
    searched = [str(options) for options in flex_kernels.every("backward", 128, SM_90)]
    assert str(flex_kernels.default("backward", 128, SM_90)) in searched
    assert len(searched) == len(set(searched)) > 10


def test_a_mod_is_printed_with_its_derivative_and_the_gradient_of_what_it_captures():
    bias = torch.empty((), requires_grad=True).expand(16, 4096, 4096)
    options = flex_kernels.default("backward", 64, SM_90)
    text = Filling("backward", Problem(64, score=biased, score_captures=(bias,)), options).text()
    assert "tl.load(in_0 + (16777216*tmp" in text
    assert "tl.atomic_add(out_grad + tl.broadcast_to((16777216*tmp" in text
    assert "out_grad" not in Filling("backward", Problem(64, causal), options).text()


def test_a_mod_that_is_not_known_is_named():
    def floored(s, b, h, i, j):
        return torch.floor(s)

    filling = Filling("forward", Problem(64, score=floored), flex_kernels.default("forward", 64, SM_90))
    with pytest.raises(NotImplementedError, match=r"aten\.floor"):
        filling.text()


def test_flex_attention_has_loops_over_partial_and_full_tiles():
    made = flex_kernels.compiled("forward", Problem(128, causal), flex_kernels.default("forward", 128, SM_90), SM_90)
    partial, full = made.loops
    assert partial.count("compare") > full.count("compare")
    assert len(partial.products) == len(full.products) > 0


def side(opcodes, count=10):
    loop = Loop(opcodes, ((64, 128, 16, True),))
    made = MachineCode("k", "sm_90", 100, 0, 0, 0, "", b"")
    return Side((Part("k", made, (loop, loop), (count, 0), Tile(128, 64, 4, 2)),))


def test_the_pipe_and_the_instructions_that_cost_are_named():
    mine, other = side({"FSEL": 100, "FFMA": 50, "HGMMA": 1}), side({"FSEL": 50, "FFMA": 50, "HGMMA": 1})
    assert mine.cycles("overlap") == 10 * 200  # logic takes two cycles for an instruction of each warp
    said = beside_flex.costs(mine, other)
    assert said.startswith("logic x 2.00") and "FSEL 50%" in said and "FFMA" not in said


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["A100", "H100"])
def test_tiles_chosen_on_the_devices_are_among_the_models_best(gpu):
    causal = next(case for case in beside_flex.cases() if case.title == "causal d128")
    line = public_choices.rank(causal, "forward", gpu)
    assert len(line["modelled seconds"]) >= 6
    assert line["rank"] <= public_choices.BEST, line


@pytest.mark.slow
def test_the_suite_writes_json_table_and_chart(tmp_path):
    run = CliRunner().invoke(app, ["compare", "--only", "decode, GQA 8 d128", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    results = json.loads((tmp_path / "machine_code.json").read_text())
    assert results["modelled"] is True
    (line,) = results["lines"]
    assert line["direction"] == "forward" and line["ratios"]["overlap"] > 0
    assert (line["costs"] != "") == (max(line["ratios"].values()) > 1)
    table = (tmp_path / "machine_code.md").read_text()
    assert "Modelled, not measured" in table and "decode, GQA 8 d128" in table
    assert (tmp_path / "machine_code.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("case", list(beside_flex.cases()), ids=lambda case: case.title)
def test_every_case_has_both_sides(case):
    """Both are compiled, and walk at least the attended pairs."""
    mine, other = (make(case, "forward", "H100") for make in (beside_flex.ours, beside_flex.flex))
    for part in (*mine.parts, *other.parts):
        assert sum(part.counts) > 0 and all(loop.count("mma") for loop in part.loops)


def test_the_best_tiles_are_written_beside_what_was_not_searched(monkeypatch, tmp_path):
    """A tile that loads ahead at the edges is a candidate of its own; one that spills is none."""

    def made(name, kernel, tile, target, head_dim):
        rest = 1000.0 - 100 * bool(tile.pipeline_edges) - tile.block_m - tile.block_n
        return {"registers": 100, "spills": int(tile.block_n == 128), "shared": 1, "stretches": [(rest, rest)] * 3}

    monkeypatch.setattr("benchmarks.machine_code.tried", made)
    path, kept = tmp_path / "tiles.json", (("mask other; score s", "dq", 64, "3.6"), tile_of((64, 32, 4, 1), ()))
    write_tiles(path, [(*kept, {}), ((form_of(SPECS["causal"]), "dq", 64, "3.5"), Tile(16, 16, 4, 1), {})])
    options = ["--head-dim", "64", "--spec", "causal", "--spec", "documents", "--kernel", "dq", "--out", str(path)]
    assert CliRunner().invoke(app, ["tiles", *options]).exit_code == 0
    found = {entry[:3]: tile for entry, tile, _ in read_tiles(path)}
    assert len(read_tiles(path)) == 3 and found[kept[0][:3]] == kept[1]
    assert found[form_of(SPECS["causal"]), "dq", 64].pipeline_edges
    assert not found[form_of(SPECS["documents"]), "dq", 64].pipeline_edges  # all its partial loops load ahead


def test_both_tiles_are_written_where_an_older_triton_takes_another(monkeypatch, tmp_path):
    """The newest wants 64 resident rows, which spill under the oldest."""
    path, spec, log = tmp_path / "tiles.json", form_of(SPECS["causal"]), str(tmp_path / "log")

    def search(triton: str, option: str) -> None:
        def made(name, kernel, tile, target, head_dim):
            narrow = tile.block_m == 64
            spills = int(narrow and triton == "3.6.0")
            return {
                "registers": 100,
                "spills": spills,
                "shared": 1,
                "stretches": [(100.0, 500.0 if narrow else 5e4)] * 3,
            }

        monkeypatch.setattr("benchmarks.machine_code.tried", made)
        monkeypatch.setattr("benchmarks.machine_code.triton_version", lambda: triton)
        options = ["--head-dim", "64", "--spec", "causal", "--kernel", "dq", "--out", str(path), option, log]
        assert CliRunner().invoke(app, ["tiles", *options]).exit_code == 0

    search("3.9.0", "--log")
    search("3.6.0", "--beside")
    found = {entry: tile for entry, tile, _ in read_tiles(path)}
    assert found.keys() == {(spec, "dq", 64, "3.6"), (spec, "dq", 64, "3.9")}
    assert found[spec, "dq", 64, "3.9"].block_m == 64 != found[spec, "dq", 64, "3.6"].block_m
