"""`attngen explain --html`: the page is whole, says what the text says, quotes what a user wrote, and loads nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attngen as ag
from attngen.cli.main import app
from attngen.inspect import picture
from attngen.inspect.explanation import explanation
from tests.inspect.html_reader import Page
from tests.keys_work import case

HOSTILE = (
    "</title><script>alert(1)</script><img src='http://example.com/x.png' onerror=alert(2)> & 'quoted' {{ 7 * 7 }}"
)
N = 96


def of_mask(spec: ag.Spec, **options: Any) -> tuple[ag.CompiledAttention, list[torch.Tensor], dict[str, Any]]:
    return ag.compile(spec, **options), [torch.randn(2, 4, 300, 32) for _ in range(3)], {}


def of_keys(name: str) -> tuple[ag.CompiledAttention, list[torch.Tensor], dict[str, Any]]:
    keys, captures = case(name, (1, 2, 2, N, N, 0))
    return ag.compile(ag.Spec(keys=keys)), [torch.randn(1, heads, N, 16) for heads in (4, 2, 2)], captures


def paged() -> tuple[ag.CompiledAttention, list[torch.Tensor], dict[str, Any]]:
    pages = torch.randn(8, 16, 2, 32)
    table, lengths = torch.arange(8, dtype=torch.int32).view(2, 4), torch.tensor([33, 64], dtype=torch.int32)
    attn = ag.compile(ag.Spec(keys=ag.paged(page_size=16), mask=ag.causal()))
    return attn, [torch.randn(2, 4, 1, 32), pages, pages], dict(page_table=table, k_len=lengths, q_offset=lengths - 1)


CALLS = {
    "window": lambda: of_mask(ag.Spec(mask=ag.causal() & ag.window(64)), schedule=ag.Schedule(block_m=64)),
    "interpreted": lambda: of_mask(ag.Spec(score=ag.soft_cap(20.0)), backend="interpret"),
    "hyper": lambda: of_keys("hyper"),
    "graph": lambda: of_keys("graph"),
    "union": lambda: of_keys("union"),
    "paged": paged,
}


def write(path: Path, name: str) -> tuple[str, str]:
    """The text and the page of a call."""
    attn, rows, captures = CALLS[name]()
    return attn.explain(*rows, html=path, **captures), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CALLS)
def test_the_page_says_what_the_text_says(name: str, tmp_path: Path):
    told, html = write(tmp_path / "page.html", name)
    said = Page(html).text.rsplit("Generated sources", 1)[0]  # kernels have words of their own
    words = {"", *map(bare, said.split())}
    for line in told.splitlines():
        if not line.startswith("  ") or set(line) <= set(" ▒·█"):  # a title, or the picture
            continue
        own = " ".join(line.replace("<- ", "").split())
        # What the page says in tables is looked for word by word: the counts of tiles, the cost, alternatives, schedules.
        if "->" in own or ", spec " in own or own.startswith(("from ", "mask:", "keys:", "for rows ")):
            assert own in said
        else:
            assert set(map(bare, own.split())) <= words, own
    assert {"spec", "plan", "facts", "cost", "schedule", "sources"} <= set(map(bare, Page(html).text.lower().split()))


def bare(word: str) -> str:
    """A word without what stands around it: text has commas where a page has columns, and `a=1, b=2` where a page has `a=1`."""
    return word.strip(":;,.()█▒·")


def test_every_step_of_both_directions_is_listed_in_order(tmp_path: Path):
    attn, rows, captures = CALLS["hyper"]()
    found = explanation(attn, *rows, 0, captures)
    attn.explain(*rows, html=tmp_path / "page.html", **captures)
    said, place = Page((tmp_path / "page.html").read_text()).text, 0
    steps = [step for plan in found.plans.values() for step in plan.steps]
    assert {step.kind for step in steps} >= {"Prepare", "Take", "Attend", "Merge", "Put"}
    for step in steps:
        place = said.index(" ".join(str(step).split()), place)  # ValueError if it is not there, or out of order
    sizes = [buffer.bytes for made in found.made.values() for buffer in made]
    assert len(sizes) > 15 and sum(sizes) > 10_000
    assert all(f"{size:,} bytes" in said for size in sizes)


def test_the_mask_is_drawn_and_its_intervals_are_listed(tmp_path: Path):
    attn, rows, captures = CALLS["window"]()
    (own,) = explanation(attn, *rows, 0, captures).attentions
    attn.explain(*rows, html=tmp_path / "page.html", **captures)
    page = Page((tmp_path / "page.html").read_text())
    (box,) = page.found("svg", class_="mask")
    down, across = own.tiles.shape
    assert box["viewbox"] == f"0 0 {across} {down}"
    drawn = torch.zeros_like(own.tiles)
    for path in page.found("path"):
        for column, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path["d"]):
            drawn[int(row), int(column) : int(column) + int(width)] = picture.NAMES.index(path["class"])
    assert torch.equal(drawn, own.tiles)
    # Tiles of 64 x 32, a window of 64: the second tile of queries, 64 to 127, sees keys 1 to 127.
    assert own.tile == (64, 32) and "64–127 0–127 partial" in page.text
    assert page.text.count("partial") > down
    assert "block_m=64" in page.text and page.found("code", class_="pinned")


def test_generated_files_are_those_of_the_schedule(tmp_path: Path):
    page = Page(write(tmp_path / "page.html", "interpreted")[1])
    assert "For backend 'interpret'." in page.text
    assert "def attngen_forward" in page.text or "@triton.jit" in page.text
    here = Page(write(tmp_path / "page.html", "window")[1]).text
    assert "by the model's choice for an H200: backend 'cpu' compiles nothing" in here
    for kernel in ("forward", "delta", "dq", "dkv", "forward_guarded"):
        assert re.search(rf"\b{kernel} \d+ lines", here)
    assert "merge" not in here.split("Generated sources")[-1].split("lines")[0]


def test_a_call_without_kernels_says_why(tmp_path: Path):
    attn = ag.compile("i >= j")
    attn.explain(*[torch.randn(1, 1, 8, 16, dtype=torch.float64)] * 3, html=tmp_path / "page.html")
    assert "none. float64 is for the CPU backend" in Page((tmp_path / "page.html").read_text()).text


def test_a_call_without_pairs_has_a_page(tmp_path: Path):
    q, k = torch.randn(1, 1, 8, 16), torch.randn(1, 1, 0, 16)
    ag.compile("i >= j").explain(q, k, k, html=tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert not page.found("svg") and "0 of 0 pairs visited" in page.text


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_loaded(name: str, tmp_path: Path):
    html = write(tmp_path / "page.html", name)[1]
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"<pre.*?</pre>", "", html, flags=re.S))
    (policy,) = page.found("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")
    ids = {own["id"] for _, own in page.tags if "id" in own}
    targets = {own["href"] for _, own in page.tags if "href" in own}
    assert targets and targets <= {f"#{own}" for own in ids}
    assert not [own for _, own in page.tags if any(attribute.startswith("on") for attribute in own)]


def test_what_a_user_wrote_is_quoted(tmp_path: Path):
    path = tmp_path / "page.html"
    attn, rows, _ = of_mask(ag.Spec(mask=ag.causal(), name=HOSTILE))
    attn.explain(*rows, html=path)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not page.found("script") and not page.found("img") and "<script" not in html
    assert page.text.count(" ".join(HOSTILE.split())) == 2  # in the title and in the heading, to the letter


def test_the_command_writes_it(tmp_path: Path):
    path = tmp_path / "page.html"
    shape = "B1 H2 N256 D32"
    result = CliRunner().invoke(app, ["explain", "i >= j and i - j < 64", "--shape", shape, "--html", str(path)])
    assert result.exit_code == 0 and f"written: {path}" in result.output.replace("\n", "")
    assert "mask: i >= j" in Page(path.read_text(encoding="utf-8")).text
