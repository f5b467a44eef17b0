"""Walks against brute force: masks are evaluated on all pairs and compared with the tiles that the programs visit."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attngen.analysis import Axis, Walk, WalkProgram, facts, run, tile_map
from attngen.language.expression import Param, Tensor
from attngen.language.programs import evaluate
from attngen.language.spec import Spec

WIDTH, PREFIX, STEP, RADIUS = Param("width"), Param("prefix"), Param("step"), Param("radius")
SHARE, SPAN = Param("share", float), Tensor("span", 1)
DOC, KEEP, LIMIT = Tensor("doc", 2, torch.int32), Tensor("keep", 2, torch.bool), Tensor("limit", 1, torch.int32)
TIME, BIAS = Tensor("time", 2), Tensor("bias", 2)
NAMES = {"params": [WIDTH, PREFIX, STEP, RADIUS, SHARE], "tensors": [SPAN, DOC, KEEP, LIMIT, TIME, BIAS]}


def spec(text: str) -> Spec:
    return Spec(text, **NAMES)


def brute(s: Spec, n_q: int, n_k: int, q_offset: int = 0, b: int = 0, h: int = 0, **captures) -> torch.Tensor:
    """The mask of one (b, h) on all pairs, bool [n_q, n_k]."""
    env = {"b": torch.tensor(b), "h": torch.tensor(h), **captures}
    env |= {"i": torch.arange(n_q).view(-1, 1) + q_offset, "j": torch.arange(n_k).view(1, -1)}
    return torch.as_tensor(evaluate(s.mask, env)).expand(n_q, n_k)


def tiles_of(mask: torch.Tensor, block_m: int, block_n: int) -> torch.Tensor:
    """The best possible tile map; a tile that reaches past the last key is partial at best."""
    rows, columns = -(-mask.shape[0] // block_m), -(-mask.shape[1] // block_n)
    result = torch.zeros(rows, columns, dtype=torch.int8)
    for r in range(rows):
        for c in range(columns):
            tile = mask[r * block_m : (r + 1) * block_m, c * block_n : (c + 1) * block_n]
            result[r, c] = 2 if tile.all() else int(tile.any())
    return result


def expected(mask: torch.Tensor, block_m: int, block_n: int, transposed: bool) -> torch.Tensor:
    """`tiles_of`, where the walked axis' ragged tail is partial: a kernel masks it."""
    best = tiles_of(mask, block_m, block_n)
    tail = best[-1:, :] if transposed else best[:, -1:]
    if mask.shape[0 if transposed else 1] % (block_m if transposed else block_n):
        tail.clamp_(max=1)
    return best


def walk_and_program(s: Spec, transposed: bool) -> tuple[Walk, WalkProgram]:
    known = facts(s)
    return (known.walk_queries, known.program_queries) if transposed else (known.walk_keys, known.program_keys)


def check(s: Spec, n_q: int, n_k: int, block_m: int, block_n: int, exact: bool = False, **call) -> int:
    """Sound in both walks, and the best possible where claimed or asked for. Returns the number of tiles."""
    mask = brute(s, n_q, n_k, **call)
    for transposed in (False, True):
        walk, program = walk_and_program(s, transposed)
        got = tile_map(s, n_q, n_k, block_m, block_n, transposed=transposed, **call)
        best = expected(mask, block_m, block_n, transposed)
        assert visits(s, n_q, n_k, block_m, block_n, transposed, **call) == int((got != 0).sum()), (
            "a tile is visited twice"
        )
        where = f"{s} {n_q}x{n_k} tiles {block_m}x{block_n} transposed={transposed} {call}\n{got}\n{best}\n{walk}"
        assert not ((got == 0) & (best != 0)).any(), "a live tile is skipped: " + where
        assert not ((got == 2) & (best != 2)).any(), "a tile with a hole, or past the end, is called full: " + where
        if exact or program.exact_live:
            assert ((got != 0) == (best != 0)).all(), "a dead tile is visited: " + where
        if exact or program.exact_holes:
            assert ((got == 2) == (best == 2)).all(), "a full tile is called partial: " + where
    return got.numel()


def visits(
    s: Spec, n_q: int, n_k: int, block_m: int, block_n: int, transposed: bool, q_offset=0, b=0, h=0, **captures
) -> int:
    """Trips of the two loops over all tiles; each stays inside the walked axis."""
    env = {**captures, "b": torch.tensor([[[b]]]), "h": torch.tensor([[[h]]])}
    axes, blocks = (Axis("i", q_offset, n_q), Axis("j", 0, n_k)), (block_m, block_n)
    walk, program = walk_and_program(s, transposed)
    tile, walked = (1, 0) if transposed else (0, 1)
    total = 0
    for first, count in sum(run(walk, program, env, axes[tile], axes[walked], blocks[tile], blocks[walked]), ()):
        assert (count >= 0).all()
        inside = (first >= 0) & (first + count <= -(-axes[walked].length // blocks[walked]))
        assert (inside | (count == 0)).all()
        total += int(count.expand(1, 1, -(-axes[tile].length // blocks[tile])).sum())
    return total


SIZES = [
    (64, 64, 16, 16),
    (50, 50, 16, 8),
    (33, 97, 8, 32),
    (97, 33, 32, 16),
    (1, 65, 16, 16),
    (65, 1, 16, 16),
    (5, 40, 128, 64),
]

EXACT = {
    "dense": ("true", {}),
    "nothing": ("i > i", {}),
    "causal": ("i >= j", {}),
    "anticausal": ("i < j", {}),
    "window": ("i >= j and i - j < 20", {}),
    "window of a param": ("i >= j and i - j < width", {"width": [0, 1, 7, 33, 1000]}),
    "two-sided window": ("j <= i + 9 and i - j < width", {"width": [-30, -9, 1, 16]}),
    "right window": ("j >= i and j - i <= width", {"width": [-1, 0, 15, 200]}),
    "prefix": ("j < prefix or i >= j", {"prefix": [-4, 0, 16, 19, 500]}),
    "prefix of a batch": ("j < limit[b] or i >= j", {"limit": [torch.tensor([23], dtype=torch.int32)]}),
    "length": ("j < limit[b]", {"limit": [torch.tensor([n], dtype=torch.int32) for n in (0, 1, 16, 40, 90)]}),
    "global and window": ("j < 4 or i >= j and i - j < 12", {}),
    "global of a param": ("i >= j and (j < prefix or i - j < width)", {"prefix": [0, 3, 16, 40], "width": [1, 17]}),
    "global both ways": ("i >= j and (j < 4 or i < 6 or i - j < 16)", {}),
    "heads differ": ("h < 4 and i >= j or h >= 4 and i >= j and i - j < 10", {}),
    "band with a hole": ("i >= j and (i - j < 8 or i - j >= 24)", {}),
    "block causal": ("i // 16 >= j // 16", {}),
    "block causal of a param": ("i // step >= j // step", {"step": [1, 5, 16, 40]}),
    "block diagonal": ("i // step == j // step", {"step": [1, 7, 16, 64]}),
    "one diagonal": ("i == j", {}),
    "all but a diagonal": ("i != j + 3", {}),
    "one key": ("j == prefix", {"prefix": [-1, 0, 20]}),
    "rows": ("i >= prefix", {"prefix": [-1, 20, 1000]}),
    "strided bound": ("2 * j <= i and 3 * j > i - 20", {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_visits_exactly_the_live_tiles(name: str) -> None:
    text, values = EXACT[name]
    s = spec(text)
    for n_q, n_k, block_m, block_n in SIZES:
        for q_offset in (0, 13, -11):
            captures = {key: random.Random(n_q + q_offset).choice(options) for key, options in values.items()}
            for h in (0, 4):
                check(s, n_q, n_k, block_m, block_n, exact=True, q_offset=q_offset, h=h, **captures)


@st.composite
def linear_masks(draw) -> str:
    """Conjunctions and disjunctions of inequalities with unit coefficients in i and j, and params."""

    def atom() -> str:
        i, j = draw(st.sampled_from([(1, -1), (-1, 1), (1, 0), (-1, 0), (0, 1), (0, -1)]))
        param = draw(st.sampled_from(["0", "width", "-width", "prefix", "-2 * prefix"]))
        return f"{i} * i + {j} * j + {param} + {draw(st.integers(-40, 40))} >= 0"

    conjunctions = [
        " and ".join(atom() for _ in range(draw(st.integers(1, 3)))) for _ in range(draw(st.integers(1, 3)))
    ]
    return " or ".join(conjunctions)


CALLS = {
    "n_q": st.sampled_from([1, 15, 16, 17, 40, 64]),
    "n_k": st.sampled_from([1, 15, 16, 33, 64, 80]),
    "block_m": st.sampled_from([1, 4, 16, 32]),
    "block_n": st.sampled_from([1, 8, 16, 32]),
    "q_offset": st.integers(-20, 70),
}


@settings(max_examples=150, deadline=None)
@given(text=linear_masks(), width=st.integers(-30, 60), prefix=st.integers(-20, 40), **CALLS)
def test_linear_masks_are_exact(text, width, prefix, n_q, n_k, block_m, block_n, q_offset) -> None:
    s = spec(text)
    captures = {n: v for n, v in {"width": width, "prefix": prefix}.items() if n in s.params}
    # Exact unless there are more intervals than a program spells out, which the program says.
    simple = text.count(" or ") == 0 or text.count(" and ") == 0
    check(s, n_q, n_k, block_m, block_n, exact=simple, q_offset=q_offset, **captures)


ATOMS = """
    i >= j; i - j < width; j < prefix; abs(i - j) <= radius; i // step >= j // step; i // 5 == j // step;
    (i - j) % 3 == 0; i % step == j % step; doc[b, i] == doc[b, j]; doc[b, i] >= doc[b, j]; doc[b, j] != 1; keep[b, j];
    keep[b, i]; j < limit[b]; time[b, i] - time[b, j] < 0.5; time[b, j] <= time[b, i]; bias[i, j] > 0; i * j < 200;
    j * j <= i + prefix; j < i * prefix; (i - j) // 4 <= radius; max(i, prefix) >= j; 2 * j + 1 < i + j // 3;
    doc[b, i] + prefix > j; h == 1 or i == j; where(h < 1, j, i) < 20; i - j < 40 * share; j <= 0.5 * i + span[h];
    j * share <= i; i - j <= span[h] or share > 0.3; doc[b, j] + doc[b, i] == 4; time[b, i] == time[b, j]
""".replace("\n", " ").split(";")


@st.composite
def any_masks(draw, depth: int = 2) -> str:
    """Masks of everything the language has: nonlinear, data dependent, negated, nested."""
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from(ATOMS))
    a, b = draw(any_masks(depth - 1)), draw(any_masks(depth - 1))
    return draw(st.sampled_from([f"({a}) and ({b})", f"({a}) or ({b})", f"not ({a})", f"not ({a} and {b})"]))


def captured(s: Spec, draw_seed: int, n_q: int, n_k: int) -> dict:
    """Values for the captures of a spec, some sorted, some not."""
    generator = torch.Generator().manual_seed(draw_seed)
    n = max(n_q + 70, n_k)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    doc = integers(0, 5, 1, n)
    if draw_seed % 3 == 0:
        doc = doc.sort(-1).values
    elif draw_seed % 3 == 1:  # runs in any order
        doc = doc[:, torch.arange(n) // 13]
    time = torch.rand(1, n, generator=generator)
    values = {
        "doc": doc,
        "keep": integers(0, 4, 1, n) > draw_seed % 4,
        "limit": integers(0, n_k + 2, 1),
        "time": time.cumsum(-1) if draw_seed % 2 else time,
        "bias": torch.randn(n, n, generator=generator),
        "span": 20 * torch.rand(2, generator=generator),
        "share": float(torch.rand(1, generator=generator)),
        "width": int(integers(-3, 40, 1)),
        "prefix": int(integers(-3, 40, 1)),
        "step": int(integers(1, 20, 1)),
        "radius": int(integers(0, 9, 1)),
    }
    return {name: values[name] for name in (*s.tensors, *s.params)}


@settings(max_examples=250, deadline=None)
@given(text=any_masks(), seed=st.integers(0, 10_000), **CALLS)
def test_no_tile_is_wrongly_full_or_empty(text, seed, n_q, n_k, block_m, block_n, q_offset) -> None:
    s = spec(text)
    check(s, n_q, n_k, block_m, block_n, q_offset=max(q_offset, 0), h=seed % 2, **captured(s, seed, n_q, n_k))


def test_ten_thousand_random_tiles() -> None:
    draw, tiles, number = random.Random(2), 0, 0
    texts = [
        "doc[b, i] == doc[b, j] and i >= j",
        "i >= j and (j < prefix or i - j < width)",
        "doc[b, i] == doc[b, j] or j < radius",
        "i // step >= j // step and i - j <= width",
        "keep[b, j] and (i >= j or j < limit[b])",
    ]
    while tiles < 10_000:
        s = spec(texts[number % len(texts)])
        n_q, n_k, block = draw.randint(100, 300), draw.randint(100, 300), draw.choice([8, 16, 32])
        tiles += check(
            s, n_q, n_k, block, draw.choice([8, 16]), q_offset=draw.randint(0, 60), **captured(s, number, n_q, n_k)
        )
        number += 1
