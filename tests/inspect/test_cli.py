"""The command line: every command works, every help has an example, errors are messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import attngen
from attngen.cli.main import app, main
from attngen.tuning.target_device import find_target_device

COMMANDS = [
    "show",
    "explain",
    "compile",
    "tune",
    "bench",
    "doctor",
    *(f"db {name}" for name in ["ls", "show", "rm", "export", "import", "verify", "coverage"]),
    "pack ls",
    "pack verify",
]


def run(*arguments: str):
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0 and f"Example: attngen {command}" in " ".join(result.output.split())
    assert run(*command.split(), "-h").output == result.output


def test_version():
    assert run("--version").output.strip() == f"attngen {attngen.__version__}"


def test_show(tmp_path):
    png = tmp_path / "mask.png"
    result = run("show", "i >= j and i - j < 1024", "-n", "4096", "--png", str(png))
    assert "392 full" in result.output and "1544 empty" in result.output and "█" in result.output
    assert png.read_bytes().startswith(b"\x89PNG")


def test_show_makes_up_what_a_spec_captures_and_says_so():
    text = "tensor doc: int[2]; param width: int; mask: doc[b, i] == doc[b, j] and i - j < width"
    result = run("show", text, "-n", "256", "--set", "width=40")
    assert "made up for this picture: doc" in " ".join(result.output.split())
    given = run("show", text, "-n", "4", "--block-m", "1", "--block-n", "1", "--set", "width=9", "--set", "doc=0,0,1,1")
    assert "8 full" in given.output and "8 empty" in given.output


def test_explain_file_and_toml(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import attngen as ag\nnear = ag.Spec(mask=ag.causal() & ag.window(64))\nnot_a_spec = 3\n")
    result = run("explain", f"{path}:near", "--shape", "B1 H2 N256 D32")
    for part in ("mask:", "facts", "plan", "cost bound (modelled)", "schedule on backend", "alternatives"):
        assert part in result.output
    toml = tmp_path / "mine.toml"
    toml.write_text('mask = "i >= j and i - j < 64"')
    key = next(line for line in result.output.splitlines() if "key" in line)
    assert key in run("explain", str(toml), "--shape", "B1 H2 N256 D32").output


def test_compile(tmp_path):
    result = run("compile", "i >= j", "--target", "sm_90", "--head-dim", "64", "--out", str(tmp_path), "--source")
    assert "@triton.jit" in result.output and "registers" in result.output
    assert {path.suffix for path in (tmp_path / "sm_90").iterdir()} == {".ptx", ".cubin"}


def test_compile_takes_gpus_by_name_and_fits_80_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("compile", "i >= j", "--target", "H100", "--target", "sm_80", "--head-dim", "64").output.splitlines()
    rows = [line for line in lines if "sm_" in line]
    assert [line.split()[1] for line in rows] == ["sm_90"] * 4 + ["sm_80"] * 4 and max(map(len, lines)) <= 80
    assert "mma 16" in run("compile", "i >= j", "--target", "H100", "--head-dim", "64", "--loops").output


def test_a_target_is_an_architecture_or_a_gpu_everywhere(tmp_path):
    spec = attngen.Spec(mask=attngen.causal())
    attn, options = attngen.compile(spec), dict(head_dim=64, dtype=torch.float16)
    text = attn.source("forward", target="sm_90", **options)
    for name in ("H100", "h200", "NVIDIA H200"):
        assert attn.source("forward", target=name, **options) == text
        (kernel,) = attngen.cross_compile(spec, target=name, passes=("forward",), **options)
        assert kernel.target == "sm_90"
        assert find_target_device(name, None).target.name == "sm_90"
    assert find_target_device("sm_90", None).target.name == "sm_90"
    with pytest.raises(attngen.ScheduleError, match=r"sm_90.*H100.*got 'GTX'"):
        attn.source("forward", target="GTX", **options)


def test_records_say_what_they_are_of(tmp_path):
    db = str(tmp_path / "a.db")
    run(
        "tune",
        "param width: int; mask: i - j < width",
        "--shape",
        "B1 H2 N64 D16",
        "--trials",
        "1",
        "--db",
        db,
        "--set",
        "width=9",
    )
    key = attngen.Spec.from_text("param width: int; mask: i - j < width").key
    listed = run("db", "ls", "--db", db).output
    assert f"{key[:12]}  mask: " in listed and "width" in listed and "param" not in listed
    told = run("db", "show", key[:12], "--db", db).output
    assert f"spec_key    {key}" in told and "param width: int" in told and "block_m=" in told and "2 records" in told
    assert run("db", "show", "param width: int; mask: i - j < width", "--db", db).output == told
    with pytest.raises(attngen.InputError, match="KEY: expected the start of a record's spec key"):
        run("db", "show", "0123abcd", "--db", db)
    store = attngen.store.open_store(db)
    store.put(*(replace(r, key=replace(r.key, n_q=4), spec=f"{r.spec} and i >= j") for r in store.records()))
    result = run("db", "verify", "--db", db)
    assert result.exit_code == 1 and "its spec has another key" in result.output


def test_warnings_are_messages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def warn() -> None:
        warnings.warn(attngen.AttngenWarning("a [b] c"), stacklevel=1)

    monkeypatch.setattr(sys.modules["attngen.cli.main"], "app", warn)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # to be put back
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main()
    assert capsys.readouterr().err == "warning a [b] c\n"


def test_records_by_spec_and_device(tmp_path):
    db = str(tmp_path / "a.db")
    sizes = ("--shape", "B1 H2 N64 D16", "--trials", "1", "--db", db)
    run("tune", "i >= j", *sizes)
    run("tune", "param width: int; mask: i - j < width", *sizes, "--set", "width=9")
    assert "4 records" in run("db", "ls", "--db", db).output
    assert "2 records" in run("db", "ls", "--db", db, "--spec", "i >= j").output
    assert "0 records" in run("db", "ls", "--db", db, "--device", "H100").output
    lines = run("db", "ls", "--db", db, "--spec", "j <= i", "--json").output.splitlines()
    key = attngen.Spec(mask="i >= j").key
    assert len(lines) == 2 and all(json.loads(line)["spec_key"] == key for line in lines)
    assert "2 records" in run("db", "ls", "--db", db, "--spec", key[:8]).output
    assert run("db", "rm", "--db", db, "--spec", "i >= j", "--yes").output.strip() == "2 records removed"
    assert "2 records" in run("db", "ls", "--db", db).output
    with pytest.raises(attngen.InputError, match="--device"):
        run("db", "rm", "--db", db)


def test_tune_then_list_export_import_verify(tmp_path):
    db, moved, file = (str(tmp_path / name) for name in ("a.db", "b.db", "records.jsonl"))
    assert "measured" in run("tune", "i >= j", "--shape", "B1 H2 N128 D16", "--trials", "2", "--db", db).output
    assert "2 records" in run("db", "ls", "--db", db).output
    assert "2 records written" in run("db", "export", file, "--db", db).output
    assert "2 records merged" in run("db", "import", file, "--db", moved).output
    assert "the database is sound" in run("db", "verify", "--db", moved).output
    assert "measured record, exact" in run("explain", "i >= j", "--shape", "B1 H2 N128 D16", "--db", moved).output


def test_doctor():
    result = run("doctor")
    assert result.exit_code == 0 and "works" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "i >= zz"], "zz"),
        (["show", "nowhere.py:x"], "no such file"),
        (["show", "i >= j", "--block-m", "-4"], "block_m"),
        (["show", "i >= j", "--set", "w=3"], "--set"),
        (["explain", "i >= j", "--shape", "what"], "shape"),
        (["explain", "i >= j", "--dtype", "int8"], "--dtype"),
        (["compile", "i >= j", "--target", "sm_12"], "sm_90"),
    ],
)
def test_errors_are_messages(arguments: list[str], says: str):
    code = "import sys; from attngen.cli.main import main; sys.argv[0] = 'attngen'; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_lists_and_models_are_tuned_and_covered(tmp_path):
    """Read, and what is missing said; the searches are tested in tests/tuning."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "dtype": "float32",
    }
    path, db = tmp_path / "config.json", str(tmp_path / "records.db")
    path.write_text(json.dumps(config))
    told = run(
        "db", "coverage", "--model", str(path), "--context", "128", "--target", "H100", "--target", "H200", "--db", db
    )
    assert "causal: Hq4 Hkv4 D16, 2 layers" in told.output and "NVIDIA H200" in told.output
    assert "covered: 0 exact, 0 by the nearest record, 4 without a record" in told.output
    assert max(map(len, told.output.splitlines())) <= 80
    lines = run("db", "coverage", "--model", str(path), "--target", "H100", "--json", "--db", db).output.splitlines()
    assert [(one["n_q"], one["n_k"], one["status"]) for one in map(json.loads, lines)] == [
        (4096, 4096, "none"),
        (1, 4096, "none"),
    ]
    assert "no records" in run("db", "coverage", "--db", db).output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tune"], "SPEC: expected a spec, a TOML file, or --model, got nothing"),
        (["tune", "i >= j", "--model", "x.json"], "SPEC: expected a spec, a TOML file, or --model, got both"),
        (["tune", "i >= j", "--batch", "2"], "--batch: expected nothing next to SPEC"),
        (["tune", "--model", "x.json", "--shape", "H1 N8 D16"], "--shape: expected nothing next to --model"),
        (["tune", "--model", "x.json", "--context", "0"], "--context: expected a positive int"),
        (["tune", "--model", "x.json"], "--model: expected a config.json"),
        (["tune", "i >= j", "--effort", "heroic"], "effort: expected one of quick"),
        (["tune", "list.toml", "--shape", "H1 N8 D16"], "--shape: expected nothing next to FILE.toml"),
    ],
)
def test_what_tune_cannot_take_is_said(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.toml").write_text("[[attention]]\nmask = 'i >= j'\nshapes = ['H1 N8 D16']\n")
    with pytest.raises(attngen.InputError, match=re.escape(says)):
        run(*arguments)


def test_bench_prints_checked_times(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # of FlexAttention, which takes long
    warnings.filterwarnings("ignore", message="flex_attention called without")
    png = tmp_path / "times.png"
    sizes = ("--shape", "B1 H2 N64 D16", "--shape", "B1 H2 Nq1 Nk64 D16", "--seconds", "0", "--device", "cpu")
    told = run("bench", "i >= j and i - j < 32", *sizes, "--png", str(png)).output
    assert told.count("of allowed") == 6 and "a dense mask of" in told and png.exists()
    assert "x faster" in told or "x slower" in told
    assert max(map(len, told.replace(str(png), "").splitlines())) <= 80
    lines = run("bench", "i >= j", *sizes, "--json", "--backward").output.splitlines()
    assert [json.loads(line)["direction"] for line in lines] == ["backward", "backward"]
