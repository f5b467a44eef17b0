"""The stream-K assignment: every tile once, equal loads, few partial states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attngen.errors import InputError
from attngen.plan.stream_k import Runs, balance, shared, slots, stream_k


def segments(runs: Runs) -> list[tuple[int, int, int, int]]:
    """(program, output, first tile, end) as a kernel walks them."""
    starts, begin, first, _ = (x.tolist() for x in runs)
    found = []
    for program in range(len(begin) - 1):
        tile, end, output = begin[program], begin[program + 1], first[program]
        while tile < end:
            stop = min(end, starts[output + 1])
            if tile < stop:
                found.append((program, output, tile, stop))
            tile, output = stop, output + 1
    return found


def check(counts: list[int], programs: int) -> None:
    runs = stream_k(torch.tensor(counts, dtype=torch.int64), programs)
    assert all(x.dtype == torch.int32 for x in runs)
    assert [list(x.shape) for x in runs] == [[len(counts) + 1], [programs + 1], [programs + 1], [len(counts), 2]]
    found = segments(runs)

    starts = runs.starts.tolist()
    assert [tile for _, _, low, high in found for tile in range(low, high)] == list(range(sum(counts)))
    for _, output, low, high in found:
        assert starts[output] <= low < high <= starts[output + 1]
    loads = (runs.begin[1:] - runs.begin[:-1]).tolist()
    assert max(loads) - min(loads) <= 1
    assert balance(sum(counts), programs) == pytest.approx(sum(counts) / max(1, programs * max(loads)) or 1.0)

    whose = {output: [program for program, o, _, _ in found if o == output] for output in range(len(counts))}
    for output, (low, high) in enumerate(runs.owners.tolist()):
        assert whose[output] == list(range(low, high + 1))  # for an output without tiles: last < first
    several = shared(runs).tolist()
    taken = [program + output for program, output, _, _ in found if several[output]]
    assert len(set(taken)) == len(taken) <= programs + len(counts)
    assert all(slot < slots(len(counts), programs) for slot in taken)


def test_a_thousand_ragged_batches() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(1000):
        longest = 2 ** draw(0, 9)
        counts = torch.randint(0, longest + 1, (draw(1, 40),), generator=generator)
        counts *= torch.rand(counts.shape, generator=generator) < 0.8
        check(counts.tolist(), draw(1, 200))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 40))
def test_any_batch(counts: list[int], programs: int) -> None:
    check(counts, programs)


@pytest.mark.parametrize(
    "counts, programs",
    [
        ([0], 1),
        ([0, 0, 0], 5),
        ([1], 132),
        ([5000], 132),
        ([3, 0, 0, 2], 200),
        ([0, 7, 0], 3),
        ([4, 4, 4], 3),
        ([1] * 9, 1),
    ],
)
def test_edges(counts: list[int], programs: int) -> None:
    check(counts, programs)


def test_no_output() -> None:
    runs = stream_k(torch.zeros(0, dtype=torch.int64), 3)
    assert runs.begin.tolist() == [0, 0, 0, 0] and runs.owners.shape == (0, 2) and not segments(runs)


def test_aligned_runs_need_no_merge() -> None:
    assert not shared(stream_k(torch.full((12,), 5), 6)).any()


def test_many_tiles_do_not_overflow() -> None:
    runs = stream_k(torch.full((4,), 2**28), 2**17)
    assert runs.begin[-1] == 2**30 and (runs.begin[1:] - runs.begin[:-1] == 2**13).all()


def test_bad_input() -> None:
    with pytest.raises(InputError, match="counts: expected int32 or int64"):
        stream_k(torch.ones(3), 2)
    with pytest.raises(InputError, match="programs: expected an int of at least 1"):
        stream_k(torch.ones(3, dtype=torch.int64), 0)
