"""How the CPU backend uses the cores and the matrix units.

A Python thread per core, each running whole (tile, head) units with single-threaded operators, has no barrier per
operator; torch releases the interpreter lock inside each. On two cores of an AMD server that takes 0.7 of the time of
letting every operator use both cores.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
SMALL = 2**24  # multiply-adds below which starting threads costs more than it saves
LEAST_ONEDNN = 2**16  # multiply-adds below which a product is not worth a oneDNN kernel of its own


def split_jobs(pairs: int, tiles: int, work: int) -> list[tuple[range, range]]:
    """At most one job per core: (which (batch, kv head) pairs, which query tiles), together all of pairs x tiles.

    `work`: multiply-adds of the whole call. The split depends on nothing else than the sizes and the number of cores, so
    that sums over jobs are deterministic.
    """
    cores = torch.get_num_threads()
    if cores == 1 or work < SMALL or pairs * tiles == 0:
        return [(range(pairs), range(tiles))]
    groups = math.gcd(pairs, cores)
    parts = min(cores // groups, tiles)
    return [(range(g, pairs, groups), range(p, tiles, parts)) for g in range(groups) for p in range(parts)]


def run_jobs(jobs: Sequence[Job], work: Callable[[int, Job], None]) -> None:
    """work(number, job) for every job, each in a thread with its share of the cores. The first error is raised here."""
    cores = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()
    errors: list[BaseException] = []

    def guarded(number: int, threads: int) -> None:
        # Thread-local modes do not reach a new thread: set what the caller's operator runs under.
        try:
            with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
                if threads != cores:
                    torch.set_num_threads(threads)
                work(number, jobs[number])
        except BaseException as error:
            errors.append(error)

    share = max(1, cores // len(jobs))
    others = [threading.Thread(target=guarded, args=(n, share), daemon=True) for n in range(1, len(jobs))]
    try:
        for thread in others:
            thread.start()
        guarded(0, share)
        for thread in others:
            thread.join()
    finally:
        if share != cores:
            torch.set_num_threads(cores)
    if errors:
        raise errors[0]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b.T for a [m, k] contiguous and b [n, k] dense in either order -> [m, n]."""
    if a.dtype == torch.float32 and a.shape[0] * a.shape[1] * b.shape[0] >= LEAST_ONEDNN and (linear := _onednn()) is not None:
        return linear(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


@cache
def _onednn() -> Any:
    """oneDNN's float32 product a @ b.T, None where it is not there.

    torch.mm goes to MKL, which does not use AVX-512 on AMD processors: half the speed (220 against 450 GFLOP/s on two cores).
    """
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
        a, b = torch.ones(3, 2), torch.full((4, 2), 2.0)
        with torch.no_grad():
            works = bool((linear(a, b, None, "none", [], "") == 4).all())
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return None
    return linear if works else None
