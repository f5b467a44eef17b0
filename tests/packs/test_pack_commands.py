"""`attngen pack ls` and `attngen pack verify`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attngen.cli.main import app
from attngen.errors import PackError
from attngen.packs.format import read, write
from tests.packs.cases import causal_pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    specs = {"causal": {"text": "param width: int\nmask: i >= j"}, "odd": 3, "rude": {"text": "\x1b[2J"}}
    kernels, files = causal_pack()
    return write(tmp_path / "pack", {"specs": specs}, kernels, files, attngen="0.1.0")


def run(*arguments: object):
    return CliRunner().invoke(app, ["pack", *map(str, arguments)])


def test_ls_shows_specs_and_kernels(folder: Path):
    printed = run("ls", folder).output
    assert "causal: param width: int; mask: i >= j\n" in printed and "odd: \n" in printed and "\x1b" not in printed
    for name, kernel in read(folder).kernels.items():
        assert re.search(
            rf"│ {name} +│ {kernel.target} +│ {kernel.num_warps} +│ .* │ {kernel.size / 1024:.0f} KiB +│", printed
        )
    size = sum(kernel.size for kernel in read(folder).kernels.values())
    assert f"4 kernels for sm_90 in 4 files of {size / 1024:.0f} KiB, made by attngen 0.1.0" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


def test_ls_as_json(folder: Path):
    said = json.loads(run("ls", folder, "--json").output)
    assert said["specs"]["causal"] == "param width: int; mask: i >= j" and said["targets"] == ["sm_90"]
    assert [kernel["name"] for kernel in said["kernels"]] == ["delta", "dkv", "dq", "forward"]
    assert said["size"] == sum(kernel["size"] for kernel in said["kernels"]) and said["digest"] == read(folder).digest


def test_a_pack_without_specs_is_listed(folder: Path):
    kernels, files = causal_pack()
    for manifest in ({}, {"specs": []}):
        write(folder, manifest, kernels, files, attngen="0.1.0")
        assert json.loads(run("ls", folder, "--json").output)["specs"] == {}


def test_verify(folder: Path):
    done = run("verify", folder)
    assert done.exit_code == 0 and done.output.startswith("the pack is sound: 4 kernels for sm_90")
    said = json.loads(run("verify", folder, "--json").output)
    assert said["sound"] and said["problem"] is None and said["digest"] == read(folder).digest

    path = folder / read(folder).kernels["dq"].file
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    done = run("verify", folder)
    assert done.exit_code == 1 and str(path) in done.output and "expected sha256" in done.output
    done = run("verify", folder, "--json")
    said = json.loads(done.output)
    assert done.exit_code == 1 and not said["sound"] and str(path) in said["problem"]
    assert isinstance(run("ls", folder).exception, PackError)


def test_links_are_taken_where_asked_for(folder: Path, tmp_path: Path):
    path = folder / read(folder).kernels["dq"].file
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    assert run("verify", folder).exit_code == 1 and run("verify", folder, "--links").exit_code == 0
