"""A thread per core, each running whole units of the CPU backend with single-threaded operators: no barrier per operator."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
SMALL = 2**24  # multiply-adds below which starting threads costs more than it saves


def split_jobs(pairs: int, tiles: int, work: int, finer: int = 1) -> list[tuple[range, range]]:
    """Jobs (which (batch, kv head) pairs, which query tiles) that together are all of pairs x tiles.

    With finer = 1 there is at most one per core, and jobs that share pairs take turns at the tiles, so that each has the
    same work under a causal mask. Else there are about `finer` times as many for threads to choose from, of neighbouring
    tiles, whose keys are still in the cache. `work`: multiply-adds of the whole call. The split depends on nothing else
    than the sizes and the number of cores, so that sums over jobs are deterministic.
    """
    cores = torch.get_num_threads()
    if cores == 1 or work < SMALL or pairs * tiles == 0:
        return [(range(pairs), range(tiles))]
    groups = math.gcd(pairs, cores)
    parts = min(cores // groups * finer, tiles)
    if finer == 1:
        shares = [range(p, tiles, parts) for p in range(parts)]
    else:
        shares = [range(p * tiles // parts, (p + 1) * tiles // parts) for p in range(parts)]
    return [(range(g, pairs, groups), share) for share in shares for g in range(groups)]


def undisturbed() -> AbstractContextManager[Any]:
    """Without what a caller may have switched on for its own operators. Looking costs less than switching."""
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast("cpu", enabled=False))
    return stack


def run_jobs(jobs: Sequence[Job], work: Callable[[int, Job], None]) -> None:
    """work(number, job) for every job. Threads take the next job when they are done with one, and share the cores among
    them. The first error is raised here, after all threads have ended.
    """
    if not jobs:
        return
    if len(jobs) == 1:
        with undisturbed():
            return work(0, jobs[0])
    cores = torch.get_num_threads()
    workers = min(cores, len(jobs))
    inference = torch.is_inference_mode_enabled()
    waiting = iter(list(enumerate(jobs)))
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run(threads: int) -> None:
        # Thread-local modes do not reach a new thread: set what the caller's operator runs under.
        with torch.inference_mode(inference), undisturbed():
            if threads != cores:
                torch.set_num_threads(threads)
            while not errors:
                with lock:
                    number, job = next(waiting, (-1, None))
                if job is None:
                    return
                work(number, job)

    def guarded(threads: int) -> None:
        try:
            run(threads)
        except BaseException as error:
            errors.append(error)

    share = max(1, cores // workers)
    others = [threading.Thread(target=guarded, args=(share,), daemon=True) for _ in range(workers - 1)]
    try:
        for thread in others:
            thread.start()
        guarded(share)
        for thread in others:
            thread.join()
    finally:
        if share != cores:
            torch.set_num_threads(cores)
    if errors:
        raise errors[0]
