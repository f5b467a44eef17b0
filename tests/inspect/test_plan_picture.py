"""Plans that people look at: as a picture, and as text that the command line prints for every key set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib import image
from typer.testing import CliRunner

import attngen as ag
from attngen.cli.main import app
from attngen.language.keyset import KINDS
from tests.keys_work import CASES, case

DRAWN = [name for name in KINDS if name not in ("union", "ragged")]
ARGUMENTS = {
    "block_sparse": "block=[32, 32]",
    "sparse_k": "k=8",
    "longformer": "window=9",
    "a_shape": "sink=2, window=9",
}
ARGUMENTS |= dict.fromkeys(("block_cluster", "butterfly", "big_bird"), "block=[32, 32]")
ARGUMENTS |= {"pruned": "keep=0.5", "hyper": "block=16, samples=16, min_len=32"}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_drawn(name: str, tmp_path: Path):
    keys, captures = case(name, (1, 2, 2, 96, 96, 0))
    rows = [torch.randn(1, heads, 96, 16) for heads in (4, 2, 2)]
    path = tmp_path / "plan.png"
    attn = ag.compile(ag.Spec(keys=keys))
    told = attn.explain(*rows, png=path, **captures)
    drawn = image.imread(path)
    assert min(drawn.shape[:2]) > 200 and drawn[..., :3].std() > 0.02  # boxes, not an empty page
    for step, _ in attn.attends(*rows, **captures):
        assert f"{step.name}:" in told and "from the model's choice" in told


@pytest.mark.parametrize("name", DRAWN)
def test_every_key_set_is_explained_from_its_text(name: str, tmp_path: Path):
    spec = tmp_path / "spec.toml"
    mask = "true" if name == "codebook" else "i >= j"
    spec.write_text(f"mask = \"{mask}\"\nkeys = '{name}({ARGUMENTS.get(name, '')})'\n")
    path, shape = tmp_path / "plan.png", "B1 Hq4 Hkv2 N128 D16"
    result = CliRunner().invoke(app, ["explain", str(spec), "--shape", shape, "--png", str(path)])
    assert result.exit_code == 0, result.output
    assert "Attend" in result.output and path.stat().st_size > 0


def test_a_step_without_its_input_names_both():
    attn = ag.compile(ag.Spec(keys=ag.qk_sparse(), score=ag.alibi()))
    q, keep = torch.randn(1, 2, 8, 16), torch.ones(1, 2, 8, dtype=torch.bool)
    call, given, executable = attn.checked(q, q, q, 0, dict(slope=torch.ones(2), keep_q=keep, keep_k=keep))
    call.captures.clear()
    with pytest.raises(ag.InputError, match="slope: expected a value for the step 'kept', got nothing"):
        executable.executor.look(executable.forward_plan, call, {"q": q, "k": q, "v": q, **given})


def test_a_preparation_of_documents_is_for_its_call():
    attn = ag.compile(ag.Spec(mask=ag.causal() & ag.documents()))
    q, doc = torch.randn(1, 2, 64, 16), (torch.arange(70) // 9).int()[None]
    plan = attn.prepare(q, q, q, doc=doc)
    want = attn(q, q, q, doc=doc)
    assert torch.equal(attn(q, q, q, doc=doc, plan=plan), want)
    assert torch.equal(attn(q, q, q, doc=doc.clone(), plan=plan), want)
    other = torch.randn(1, 2, 32, 16)
    near = ag.compile(ag.Spec(mask=ag.causal() & ag.documents() & ag.window(9)))
    for run, message in (
        (lambda: attn(q, q, q, doc=doc // 2, plan=plan), "doc: expected what the plan was made from"),
        (lambda: attn(q, q, q, doc=doc, q_offset=3, plan=plan), "plan: expected a plan for"),
        (lambda: attn(other, other, other, doc=doc, plan=plan), "plan: expected a plan for"),
        (lambda: near(q, q, q, doc=doc, plan=plan), "plan: expected a plan for the mask"),
        (lambda: attn(*[q.to("meta")] * 3, doc=doc.to("meta"), plan=plan), "plan: expected a plan for"),
        (lambda: attn(q, q, q, doc=doc, plan={}), "plan: expected what attn.plan"),
    ):
        for _ in range(2):  # the second time the signature is known
            with pytest.raises(ag.InputError, match=message):
                run()
    doc[0, 5] = 7
    with pytest.raises(ag.InputError, match=r"doc: .* changed in place"):
        attn(q, q, q, doc=doc, plan=plan)
