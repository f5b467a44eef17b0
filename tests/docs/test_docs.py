"""The documentation is true: its blocks of code run, its commands work, errors are as shown, and the cookbook's two columns
compute the same.
"""

from __future__ import annotations

import doctest
import html
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attngen as ag
from attngen.cli.main import app
from attngen.language import patterns
from attngen.language.expression.builder import FUNCTIONS
from attngen.language.expression.parse import _SYMBOLS
from attngen.language.keyset import KINDS
from attngen.language.schedule import Schedule, Tile

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
BLOCK = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", re.M | re.S)
KNOWN = {"python", "pycon", "bash", "toml", "json"}
COOKBOOK = {"from_flex_attention": 11, "from_sdpa": 9}  # comparisons
CLOSE = 1e-5  # tests.check's bound for results in float32; gradients have ten times as much


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its title, its text, the line of the page that it begins at, and whether it stands
    beside the one before it.
    """

    language: str
    title: str
    text: str
    line: int
    second: bool


def blocks(page: str) -> Iterator[Block]:
    """In the order of the page."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        beside = text[: found.start()].rpartition('<div class="beside" markdown>')[2]
        second = "</div>" not in beside and "```" in beside and "\n#" not in beside
        line = text[: found.start()].count("\n") + 1
        yield Block(found[2], found[3] or "", textwrap.dedent(found[4]), line, second)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One after the other, as somebody would who types them in, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"a_reader_of_{page}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # torch looks functions up by module
    space = module.__dict__
    compared = 0
    for block in blocks(page):
        assert block.language in KNOWN, f"{page}.md, line {block.line}: who runs {block.language}?"
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, DOCS / f"{page}.md", "exec"), space)
            if block.second:
                compare(space.pop("theirs"), space.pop("ours"), f"{page}.md, line {block.line}")
                compared += 1
        elif block.language == "pycon":
            session(block, page, space)
        elif block.language == "bash":
            for line in block.text.splitlines():
                command(line, f"{page}.md, line {block.line}")
    assert compared == COOKBOOK.get(page, 0)


def session(block: Block, page: str, space: dict[str, Any]) -> None:
    """What is shown is what comes, errors included."""
    test = doctest.DocTestParser().get_doctest(block.text, space, page, f"{page}.md", block.line)
    assert test.examples, f"{page}.md, line {block.line}: nothing to run"
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not runner.run(test, out=told.append, clear_globs=False).failed, "".join(told)
    space |= test.globs


def command(line: str, where: str) -> None:
    """A line of a shell: attngen's own are run, others are for setting up."""
    if not line.startswith("attngen "):
        assert line.split()[0] in ("pip", "python", "mkdocs"), f"{where}: who runs {line!r}?"
        return
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0, f"{where}: {line}\n{result.output}\n{result.exception}"


def compare(theirs: Any, ours: Any, where: str) -> None:
    """Tensors, or as many of them on both sides."""
    theirs, ours = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (theirs, ours))
    assert len(theirs) == len(ours) > 0
    for place, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert a.shape == b.shape and a.isfinite().all() and a.norm() > 0, where
        error = ((a - b).norm() / a.norm()).item()
        assert error <= (CLOSE if place == 0 else 10 * CLOSE), f"{where}: {error:.1e}"


# -- nothing is left out ------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_contents():
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r": (\w+)\.md$", contents, re.M)) == PAGES


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text):
            path = DOCS / target if target else DOCS / f"{page}.md"
            assert path.is_file(), f"{page}.md: {target}"
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
            assert not anchor or anchor[1:] in slugs, f"{page}.md: {target}{anchor}"


def test_the_language_is_told_whole():
    text = BLOCK.sub("", (DOCS / "language.md").read_text(encoding="utf-8"))
    code = [html.unescape(a or b) for a, b in re.findall(r"`([^`\n]+)`|<code>(.*?)</code>", text)]
    named = {name for words in code for name in re.findall(r"\w+", words)}
    assert {*FUNCTIONS, *_SYMBOLS} <= named
    assert {"==", "!=", "<", "<=", ">", ">=", "and", "or", "not"} <= {*code}
    assert {"+", "-", "*", "/", "//", "%", "**", "&", "|", "^", "~", "<<", ">>"} <= {*code}
    assert {name for name in ag.__all__ if getattr(getattr(ag, name), "__module__", "") == patterns.__name__} <= named


def test_every_key_set_and_decision_is_named():
    keys = (DOCS / "keysets.md").read_text(encoding="utf-8")
    for name in KINDS.keys() - {"ragged"}:  # the lengths of a ragged batch, which nobody writes in keys=
        assert re.search(rf"\b{name}\b", keys), f"keysets.md does not name {name}"
    how = (DOCS / "schedules.md").read_text(encoding="utf-8")
    shared = {"split", "programs", "pack", "store", "deterministic", "precision"}
    decisions = {*Tile.__dataclass_fields__, *Schedule.__dataclass_fields__} - {"forward", "dq", "dkv"}
    assert shared <= decisions
    for name in decisions:
        assert re.search(rf"`{name}\b", how), f"schedules.md does not name {name}"


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: (\S+)$", text, re.M))
    names = {name: getattr(ag, name) for name in ag.__all__}
    paths = {
        value.__name__ if isinstance(value, ModuleType) else f"{value.__module__}.{value.__qualname__}"
        for value in names.values()
    }
    assert listed == paths
    for name, value in names.items():
        assert (value.__doc__ or "").strip(), f"ag.{name} has no docstring"
