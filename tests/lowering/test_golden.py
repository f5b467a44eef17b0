"""The generated source, word for word. `pytest tests/lowering/test_golden.py --update-golden` rewrites the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.analysis import facts
from attngen.analysis.sites import site_of
from attngen.language.lists import RowLists, TileLists
from attngen.lowering import render
from attngen.lowering.tables import render_tables
from attngen.plan.launches import backward_launches, learned_of
from attngen.schedule import Schedule, Tile

GOLDEN = Path(__file__).parent / "golden"
TILES = Schedule(
    **{
        prefix + name: value
        for prefix in ("", "dq_", "dkv_")
        for name, value in dict(block_m=64, block_n=32, num_warps=4, num_stages=2).items()
    },
    deterministic=True,
    precision="ieee",
)
SPARING = Tile(64, 128, 8, 2, tma=True, disable_licm=True, separate_sums=True)
SPECS = {
    "full": ag.Spec(),
    "causal": ag.Spec(mask=ag.causal()),
    "causal_window": ag.Spec(mask=ag.causal() & ag.window(ag.Param("width"))),
    "documents_soft_cap": ag.Spec(mask=ag.documents() & ag.causal(), score=ag.soft_cap(30.0)),
    "biases": ag.Spec(
        mask="bias[b, i] >= bias[b, j] and i - j < slope[h]", tensors=[ag.Tensor("bias", 2), ag.Tensor("slope", 1)]
    ),
    "alibi_dropout": ag.Spec(mask=ag.causal(), score=ag.alibi(), dropout=0.1),
    "global_bias_sink": ag.Spec(
        mask=(ag.window(9) | ag.global_tokens(3)) & ag.causal(),
        score=ag.bias("hij"),
        sink=lambda b, h, i: ag.Tensor("sink", 1)[h],
    ),
    "padding": ag.Spec(score="s + bias[b, j]", tensors=[ag.Tensor("bias", 2)]),
    "distances": ag.Spec(
        mask=ag.causal(),
        score="s + slope[h, min(i - j, 31)] + bias[i, j]",
        tensors=[ag.Tensor("slope", 2), ag.Tensor("bias", 2)],
    ),
    "tiles": ag.Spec(mask=ag.causal(), lists=TileLists(128, 64)),
    "rows": ag.Spec(mask=ag.causal(), lists=RowLists(weighted=True)),
    "paged": ag.Spec(mask=ag.causal() & ag.window(512), page_size=16, sink=lambda b, h, i: ag.Tensor("sink", 1)[h]),
}
DECISIONS = ("split", "pack", "dkv")  # of the options: what the schedule decides
LEARNS: dict[str, Any] = {"learns": True}  # with the gradients of all captured tensors
# name -> (spec, kernel, head dim of q and k, of v, dtype, options)
FILES: dict[str, tuple[str, str, int, int, torch.dtype, dict[str, Any]]] = {
    "full_forward": ("full", "forward", 64, 64, torch.bfloat16, {}),
    "full_delta": ("full", "delta", 64, 64, torch.bfloat16, {}),
    "full_delta_of_out": ("full", "delta_of_out", 64, 64, torch.bfloat16, {}),
    "full_dkv": ("full", "dkv", 64, 64, torch.bfloat16, {}),
    "causal_window_forward": ("causal_window", "forward", 128, 128, torch.bfloat16, {}),
    "causal_forward_guarded": ("causal", "forward_guarded", 128, 128, torch.bfloat16, {}),
    "causal_dq_guarded": ("causal", "dq_guarded", 64, 64, torch.bfloat16, {}),
    "causal_window_dq": ("causal_window", "dq", 128, 128, torch.bfloat16, {}),
    "causal_window_dkv": ("causal_window", "dkv", 128, 128, torch.bfloat16, {}),
    "causal_separate_dkv": ("causal", "dkv", 192, 192, torch.bfloat16, {"dkv": SPARING}),
    "documents_soft_cap_forward": ("documents_soft_cap", "forward", 80, 192, torch.float16, {}),
    "documents_soft_cap_dkv": ("documents_soft_cap", "dkv", 80, 192, torch.float16, {}),
    "documents_soft_cap_tables": ("documents_soft_cap", "tables of forward", 0, 0, torch.int32, {}),
    "biases_tables": ("biases", "tables of dkv", 0, 0, torch.int32, {"offset_tensor": True}),
    "alibi_dropout_forward": ("alibi_dropout", "forward", 64, 64, torch.float32, {"offset_tensor": True}),
    "alibi_dropout_dkv": ("alibi_dropout", "dkv", 64, 64, torch.float32, {"offset_tensor": True}),
    "alibi_dropout_excess": ("alibi_dropout", "excess", 64, 64, torch.bfloat16, {}),
    "alibi_dropout_dq": ("alibi_dropout", "dq", 64, 64, torch.bfloat16, LEARNS),
    "global_bias_sink_forward": ("global_bias_sink", "forward", 40, 24, torch.float16, {"aligned": False}),
    "global_bias_sink_dkv": ("global_bias_sink", "dkv", 40, 24, torch.float16, {"aligned": False}),
    "global_bias_sink_dq": ("global_bias_sink", "dq", 64, 64, torch.bfloat16, LEARNS),
    "padding_dkv": ("padding", "dkv", 64, 64, torch.bfloat16, LEARNS),
    "distances_dq": ("distances", "dq", 64, 64, torch.bfloat16, LEARNS),
    "distances_capture": ("distances", "capture", 64, 64, torch.bfloat16, LEARNS),
    "tiles_forward": ("tiles", "forward", 64, 64, torch.bfloat16, {}),
    "tiles_dkv": ("tiles", "dkv", 64, 64, torch.bfloat16, {}),
    "rows_dq": ("rows", "dq", 64, 64, torch.bfloat16, LEARNS),
    "rows_dkv": ("rows", "dkv", 64, 64, torch.bfloat16, {}),
    "paged_split_forward": ("paged", "forward", 128, 128, torch.bfloat16, {"split": 4}),
    "paged_split_merge": ("paged", "merge", 128, 128, torch.bfloat16, {"split": 4}),
    "stream_forward": ("causal_window", "forward", 80, 80, torch.bfloat16, {"split": "stream", "pack": True}),
    "stream_merge": ("causal_window", "merge", 80, 80, torch.bfloat16, {"split": "stream", "pack": True}),
}


def text(name: str) -> str:
    """The generated text of a golden file."""
    spec_name, kernel, head_dim, head_dim_v, dtype, options = FILES[name]
    known = facts(SPECS[spec_name])
    if kernel.startswith("tables of "):
        return render_tables(
            SPECS[spec_name], known, kernel.removeprefix("tables of "), 64, "offset_tensor" in options
        ).text
    spec, decided = SPECS[spec_name], {option: value for option, value in options.items() if option in DECISIONS}
    options = {option: value for option, value in options.items() if option not in (*DECISIONS, "learns")}
    schedule = Schedule(**decided).over(TILES)
    sizes = dict(head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, schedule=schedule)
    if "learns" in FILES[name][5]:
        launches = backward_launches(known, spec.lists, dtype, schedule, learned_of(known, spec.lists))
        plain = next(launch.sites for launch in launches if launch.kernel == kernel)
        options["sites"] = tuple(site_of(known.load_grads, site) for site in plain)
    return render(spec, known, kernel, **sizes, **options).text


@pytest.mark.parametrize("name", FILES)
def test_source_is_the_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{name}.py"
    if request.config.getoption("--update-golden"):
        path.write_text(text(name), encoding="utf-8")
    assert text(name) == path.read_text(encoding="utf-8"), (
        f"{path.name} changed: look at the difference, then --update-golden"
    )


def test_golden_files_are_formatted() -> None:
    pytest.importorskip("ruff", reason="ruff is not installed")
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--line-length", "110", "--target-version", "py311"]
    run = subprocess.run([*ruff, "format", "--diff", *options, str(GOLDEN)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    select = ["--select", "E,F,W", "--ignore", "E741"]
    run = subprocess.run([*ruff, "check", *options, *select, str(GOLDEN)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.py")} == set(FILES)
