"""The ring on four gloo processes, started once. The cases are in `ring_cases`."""

from __future__ import annotations

import queue
import time
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import attngen as ag
from attngen.distributed.shards import equal_sizes, positions, shard, spans, unshard
from tests.ring_cases import CASES, DEAD, WORLD, work

LIMIT = 120  # seconds


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    context = mp.get_context("forkserver")  # torch and attngen are imported once for all four
    context.set_forkserver_preload(["tests.ring_cases"])
    line: Any = context.Queue()
    folder = str(tmp_path_factory.mktemp("ring"))
    processes = [context.Process(target=work, args=(rank, WORLD, folder, line), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    found: dict[tuple[int, str], str] = {}
    end = time.monotonic() + LIMIT
    try:
        while len(found) < WORLD * len(CASES) and time.monotonic() < end:
            if not any(process.is_alive() for process in processes) and line.empty():
                break
            try:
                rank, name, problem = line.get(timeout=0.5)
                found[rank, name] = problem
            except queue.Empty:
                continue
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    return found


@pytest.mark.parametrize("name", CASES)
def test_on_four_processes(name: str, answers: dict[tuple[int, str], str]) -> None:
    for rank in range(WORLD):
        assert (rank, name) in answers, f"rank {rank} never came to an end of {name}"
        assert not answers[rank, name], f"rank {rank}: {answers[rank, name]}"
    assert DEAD < WORLD


@pytest.mark.parametrize("layout", ["contiguous", "paired"])
@pytest.mark.parametrize("sizes", [4, [3, 0, 5, 9], [1], [0, 0, 2]])
def test_shards_make_up_the_whole(layout: str, sizes: Any) -> None:
    x = torch.arange(17 if sizes == 4 else sum(sizes)).view(1, 1, -1)
    lengths = equal_sizes(17, 4) if sizes == 4 else sizes
    parts = [shard(x, rank, sizes, layout) for rank in range(len(lengths))]
    assert [part.shape[2] for part in parts] == lengths
    assert torch.equal(unshard(parts, layout), x)
    for rank, part in enumerate(parts):
        assert torch.equal(positions(rank, lengths, layout), part.flatten())


def test_paired_spans() -> None:
    assert spans([4, 4], "paired") == [[range(0, 2), range(6, 8)], [range(2, 4), range(4, 6)]]
    assert spans([3, 2], "paired") == [[range(0, 2), range(4, 5)], [range(2, 3), range(3, 4)]]


def test_shard_lengths_must_add_up() -> None:
    with pytest.raises(ag.InputError, match="sizes: expected lengths that add up to 8"):
        shard(torch.zeros(1, 1, 8), 0, [3, 4])
    with pytest.raises(ag.InputError, match="layout: expected one of"):
        spans([1], "zigzag")


def test_without_a_group() -> None:
    with pytest.raises(ag.InputError, match="group: expected an initialised process group"):
        ag.ring(ag.compile(ag.Spec()))
