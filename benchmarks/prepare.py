"""Measuring what comes before attention: planning a mask, and first calls in new processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attngen.analysis import Axis, facts
from attngen.analysis import run as run_walk
from benchmarks.case import FORWARD, Case
from benchmarks.measure import (
    FAILED,
    OK,
    Context,
    Record,
    clean,
    describe,
    failure,
    named,
    on_host,
    synchronize,
    with_ratio,
)
from benchmarks.memory import peak_memory
from benchmarks.peers import Unavailable, block_mask_of, compiled_flex, dense_mask
from benchmarks.timing import Candidate, Timing, race
from benchmarks.work import Inputs

BLOCK = 128
CHILD_LIMIT = 300.0  # seconds for one new process
# Bytes a pair that create_block_mask holds when not compiled: two masks of bools, and one of int64, which both i - j and the
# sum of a block's bools make.
UNCOMPILED = 10

# -- planning ---------------------------------------------------------------------------------------------------------


def planning(case: Case, peers: tuple[str, ...], context: Context) -> Iterator[Record]:
    """Milliseconds to find the live tiles of 128 x 128, and the peak of memory meanwhile."""
    inputs = Inputs.make(case, context.device)
    ready: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int | None] = {}
    for peer in peers:
        context.starting(peer)
        try:
            plan = named(PLANNERS, peer)(inputs)
            _expect_tiles(peer, plan(), inputs)
            peaks[peer] = peak_memory(plan, context.device)
            ready[peer] = plan
        except Exception as error:
            yield failure(case, peer, error)
    context.starting("")
    candidates = {peer: _finished(plan, context.device) for peer, plan in ready.items()}
    raced = race(candidates, on_host(context), context.seconds, clock=context.clock)
    for peer, reason in raced.failed.items():
        yield Record(case.id, peer, FAILED, clean(reason), described=describe(case))
    records = [
        Record(
            case.id, peer, OK, timing=timing, figure=1e3 * timing.median, unit="ms",
            notes={"peak bytes": peaks[peer]}, described=describe(case),
        )
        for peer, timing in raced.timings.items()
    ]  # fmt: skip
    yield from with_ratio(records, raced=raced)


def _finished(plan: Callable[[], Any], device: torch.device) -> Candidate:
    """Timed until the device is done with it."""

    def run(_: Any) -> Any:
        planned = plan()
        synchronize(device)
        return planned

    return Candidate(lambda: synchronize(device), run)


def plan_attngen(inputs: Inputs) -> Callable[[], Any]:
    """All tile intervals, which the kernels work out in registers where the mask has a closed form."""
    case, device = inputs.case, inputs.q.device
    known = facts(inputs.pattern.spec)
    scope = {
        **inputs.captures,
        "b": torch.arange(case.batch, device=device).view(-1, 1, 1),
        "h": torch.zeros(1, 1, 1, dtype=torch.int64, device=device),
    }
    queries, keys = Axis("i", 0, case.n_q), Axis("j", 0, case.n_k)
    return lambda: run_walk(known.walk_keys, known.program_keys, scope, queries, keys, BLOCK, BLOCK, device)


def plan_flex(compiled: bool) -> Callable[[Inputs], Callable[[], Any]]:
    """FlexAttention's create_block_mask."""

    def build(inputs: Inputs) -> Callable[[], Any]:
        _fits(inputs, 1 if compiled else UNCOMPILED)
        return lambda: block_mask_of(inputs, compiled)

    return build


def plan_dense(inputs: Inputs) -> Callable[[], Any]:
    """A boolean mask of every pair, as SDPA takes it."""
    _fits(inputs, 3)
    return lambda: dense_mask(inputs)


PLANNERS: dict[str, Callable[[Inputs], Callable[[], Any]]] = {
    "attngen": plan_attngen,
    "create_block_mask": plan_flex(False),
    "create_block_mask-compiled": plan_flex(True),
    "dense-mask": plan_dense,
}


def _fits(inputs: Inputs, times: int) -> None:
    """A dense mask of one byte a pair must fit `times` into what is free."""
    needed = times * inputs.case.n_q * inputs.case.n_k
    if inputs.q.device.type == "cuda":
        free = torch.cuda.mem_get_info(inputs.q.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * free:
        raise Unavailable(f"needs about {needed / 2**30:.0f} GiB for dense masks, {free / 2**30:.0f} are free")


def _expect_tiles(peer: str, planned: Any, inputs: Inputs) -> None:
    """The plan must hold each row's own tile for the first and last query: a cheap sign of life, not a proof."""
    if peer == "attngen":
        full, partial = planned
        count = sum(int(pair[1].sum()) for group in (full, partial) for pair in group)
    elif peer == "dense-mask":
        count = int(planned.any(-1).sum())
    else:
        count = int(planned.kv_num_blocks.sum())
        count += 0 if planned.full_kv_num_blocks is None else int(planned.full_kv_num_blocks.sum())
    if count < inputs.case.n_q // BLOCK:
        raise RuntimeError(f"a plan of only {count} tiles")


# -- first calls ------------------------------------------------------------------------------------------------------


def first_call(case: Case, peers: tuple[str, ...], context: Context) -> Iterator[Record]:
    """Seconds from having inputs to the first result, in new processes with empty caches; likewise importing attngen after
    torch, and cross-compiling forward and backward for sm_90.
    """
    records = []
    for peer in peers:
        context.starting(peer)
        try:
            seconds, notes = _new_processes(case, peer, context)
        except Exception as error:
            yield failure(case, peer, error)
            continue
        timing = Timing.of(seconds)
        records.append(
            Record(
                case.id, peer, OK, timing=timing, figure=timing.median, unit="s", notes=notes, described=describe(case)
            )
        )
    yield from with_ratio(records)


def _new_processes(case: Case, peer: str, context: Context) -> tuple[list[float], dict[str, Any]]:
    named({"attngen": None, "flex": None}, peer)
    if case.direction in ("import", "cross-compile"):
        named({"attngen": None}, peer)
    if case.direction == "import":
        return [_import_seconds() for _ in range(3)], {}
    seconds: list[float] = []
    notes: dict[str, Any] = {}
    for _ in range(3 if peer == "attngen" else 1):
        with tempfile.TemporaryDirectory() as folder:
            names = {
                "TORCHINDUCTOR_CACHE_DIR": "inductor",
                "TRITON_CACHE_DIR": "triton",
                "ATTNGEN_CACHE_DIR": "attngen",
            }
            environment = {**os.environ, **{name: os.path.join(folder, sub) for name, sub in names.items()}}
            job = {"case": case.id, "peer": peer, "device": str(context.device), "small": case.n_k < 8192}
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.prepare", json.dumps(job)],
                env=environment, capture_output=True, text=True, timeout=CHILD_LIMIT, check=False,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        answer = json.loads(done.stdout.splitlines()[-1])
        seconds.append(answer["seconds"])
        notes = answer["notes"]
    return seconds, notes


def child(job: dict[str, Any]) -> dict[str, Any]:
    """What a new process measures."""
    from benchmarks.case import Sizes
    from benchmarks.cases import cases_of

    device = torch.device(job["device"])
    sizes = Sizes(small=job["small"], cuda=device.type == "cuda")
    (case,) = (case for case in cases_of("first_call", sizes) if case.id == job["case"])
    if case.direction == "cross-compile":
        return _cross_compile(case)
    import attngen as ag

    inputs = Inputs.make(case, device)
    # torch's own first-use costs are nobody's
    q, k, v = (t.detach()[:, :, :64] for t in (inputs.q, inputs.k, inputs.v))
    torch.nn.functional.scaled_dot_product_attention(q, k, v)
    synchronize(device)
    function = compiled_flex(None) if job["peer"] == "flex" else None
    start = time.perf_counter()
    with torch.set_grad_enabled(case.direction != FORWARD):
        if function is not None:
            out = function(inputs.q, inputs.k, inputs.v, block_mask=block_mask_of(inputs))
        else:
            out = ag.compile(inputs.pattern.spec)(inputs.q, inputs.k, inputs.v, **inputs.captures)
        if inputs.leaves:
            torch.autograd.grad(out, list(inputs.leaves.values()), inputs.d_out)
    synchronize(device)
    return {"seconds": time.perf_counter() - start, "notes": {}}


def _cross_compile(case: Case) -> dict[str, Any]:
    import attngen as ag
    from benchmarks.patterns import PATTERNS

    start = time.perf_counter()
    kernels = ag.cross_compile(PATTERNS[case.pattern].spec, "sm_90", dtype=torch.bfloat16, head_dim=128)
    seconds = time.perf_counter() - start
    notes = {k.name: {"registers": k.registers, "spills": k.spills, "shared": k.shared} for k in kernels}
    return {"seconds": seconds, "notes": notes}


def _import_seconds() -> float:
    """Of importing attngen after torch, in a new process."""
    code = "import time, torch; t = time.perf_counter(); import attngen; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=CHILD_LIMIT)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
