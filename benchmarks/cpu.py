"""The CPU backend against PyTorch's own attention on this machine.

    python -m benchmarks.cpu                                  all figures, with their ratios
    python -m benchmarks.cpu --only window dense              some of them
    python -m benchmarks.cpu --json cpu.json --markdown cpu.md

Candidates of a comparison run in turn, in one process. What is compiled is timed cold: in a process of its own with an
empty compile cache. Inputs are random float32, B1 H8 D64. FlexAttention's compiler needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import Line, save
from benchmarks.timing import Timing, interleaved, ratio

HEADS, HEAD_DIM, WINDOW, N = 8, 64, 512, 8192


def inputs(n: int, grad: bool = False) -> list[torch.Tensor]:
    """q, k, v [1, 8, n, 64]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, n, HEAD_DIM, generator=generator).requires_grad_(grad) for _ in range(3)]


def window_spec() -> Any:
    """Causal, the last 512 keys."""
    import attngen as ag

    return ag.Spec(mask=ag.causal() & ag.window(WINDOW))


def flex_block_mask(n: int) -> Any:
    """FlexAttention's metadata for the same mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < WINDOW), None, None, n, n, device="cpu")


def flex_compiled() -> Callable[..., Any]:
    """FlexAttention through torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def sdpa_by_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int = 128) -> torch.Tensor:
    """SDPA called once per block of query rows on its live keys: what a user can do without attngen."""
    out = torch.empty_like(q)
    for start in range(0, q.shape[2], rows):
        stop, low = min(start + rows, q.shape[2]), max(0, start - WINDOW + 1)
        i, j = torch.arange(start, stop).view(-1, 1), torch.arange(low, stop)
        mask = (i >= j) & (i - j < WINDOW)
        out[:, :, start:stop] = F.scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, low:stop], v[:, :, low:stop], attn_mask=mask
        )
    return out


def dense_mask(n: int) -> torch.Tensor:
    """The window as a boolean matrix."""
    i, j = torch.arange(n).view(-1, 1), torch.arange(n)
    return (i >= j) & (i - j < WINDOW)


def window(rounds: int) -> list[Line]:
    """Forward of the window against compiled FlexAttention, and cold, with compile and mask building on each side."""
    import attngen as ag

    q, k, v = inputs(N)
    attn, flex, blocks = ag.compile(window_spec()), flex_compiled(), flex_block_mask(N)
    with torch.no_grad():
        expected = sdpa_by_block(q, k, v)
        for out in (attn(q, k, v), flex(q, k, v, block_mask=blocks)):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        runs = {
            "attngen": lambda: attn(q, k, v),
            "FlexAttention": lambda: flex(q, k, v, block_mask=blocks),
            "SDPA by block": lambda: sdpa_by_block(q, k, v),
        }
        single, repeated = interleaved(runs, rounds), interleaved(runs, max(3, rounds // 2), repeat=3)
    name = f"window {WINDOW} forward, N {N}"
    return [
        Line(f"{name}, {turns}: against {peer}", ratio(timings, "attngen", peer), "x", target, True, _asdicts(timings))
        for turns, timings in (("one run at a turn", single), ("three runs at a turn", repeated))
        for peer, target in {"FlexAttention": 1.3, "SDPA by block": 1.0}.items()
    ]


def _asdicts(timings: dict[str, Timing]) -> dict[str, Any]:
    return {name: asdict(timing) for name, timing in timings.items()}


def cold(rounds: int) -> list[Line]:
    """Mask building, compile and first run, each side in a process of its own."""
    ours = Timing.of([_in_new_process("attngen") for _ in range(3)])
    peer = Timing.of([_in_new_process("flex")])
    both = {"attngen": asdict(ours), "FlexAttention": asdict(peer)}
    name = f"window {WINDOW} forward, N {N}"
    return [
        Line(f"{name}, with compile and mask: against FlexAttention", peer.median / ours.median, "x", 15, True, both),
        Line(f"{name}: compile to first result", ours.median, "s", 0.3, False, {"attngen": asdict(ours)}),
    ]


def _in_new_process(side: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "ATTNGEN_DB": os.path.join(folder, "records.db"),
        }
        command = [sys.executable, "-m", "benchmarks.cpu", "--cold-side", side]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def cold_side(side: str) -> float:
    """Seconds from having inputs to the first result, imports not counted."""
    import attngen as ag

    q, k, v = inputs(N)
    F.scaled_dot_product_attention(q[:, :, :256], k[:, :, :256], v[:, :, :256])  # torch's own first-use costs
    flex_attention = flex_compiled() if side == "flex" else None
    start = time.perf_counter()
    with torch.no_grad():
        if flex_attention is not None:
            flex_attention(q, k, v, block_mask=flex_block_mask(N))
        else:
            ag.compile(window_spec())(q, k, v)
    return time.perf_counter() - start


def linear(rounds: int) -> list[Line]:
    """Forward time per row from N 8192 to 65536 at a fixed window."""
    import attngen as ag

    attn = ag.compile(window_spec())
    given = {n: inputs(n) for n in (8192, 16384, 32768, 65536)}
    with torch.no_grad():
        timings = interleaved({str(n): (lambda n=n: attn(*given[n])) for n in given}, max(3, rounds // 2), warmup=1)
    growth = timings["65536"].median / timings["8192"].median / 8
    measured = {f"N {n}": asdict(t) for n, t in timings.items()}
    return [Line("window forward: time per row at N 65536 over that at 8192", growth, "x", 1.15, False, measured)]


def dense(rounds: int) -> list[Line]:
    """Dense causal attention against SDPA."""
    import attngen as ag

    attn = ag.compile(ag.Spec(mask=ag.causal()))
    lines = []
    for n in (2048, N):
        given = inputs(n)
        sdpa = partial(F.scaled_dot_product_attention, *given, is_causal=True)
        candidates: dict[str, Callable[[], Any]] = {"attngen": partial(attn, *given), "SDPA": sdpa}
        with torch.no_grad():
            torch.testing.assert_close(candidates["attngen"](), sdpa(), rtol=1e-4, atol=1e-5)
            timings = interleaved(candidates, max(3, rounds // 2), warmup=1)
        measured = {name: asdict(t) for name, t in timings.items()}
        figure = ratio(timings, "attngen", "SDPA")
        lines.append(Line(f"dense causal forward, N {n}: against SDPA", figure, "x", 1.0, True, measured))
    return lines


def backward(rounds: int) -> list[Line]:
    """Forward and backward of the window against SDPA with the dense mask."""
    import attngen as ag

    attn, mask = ag.compile(window_spec()), dense_mask(N)
    leaves = inputs(N, grad=True)
    seed = torch.randn(1, HEADS, N, HEAD_DIM, generator=torch.Generator().manual_seed(1))

    def ours() -> Any:
        return torch.autograd.grad(attn(*leaves), leaves, seed)

    def peer() -> Any:
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves, attn_mask=mask), leaves, seed)

    for got, want in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    timings = interleaved({"attngen": ours, "SDPA, dense mask": peer}, max(3, rounds // 3), warmup=0)
    measured = {name: asdict(t) for name, t in timings.items()}
    figure = ratio(timings, "attngen", "SDPA, dense mask")
    return [Line(f"window forward + backward, N {N}: against SDPA, dense mask", figure, "x", 3, True, measured)]


def planning(rounds: int) -> list[Line]:
    """Which key tiles each query tile visits at N 131072: time, and bytes of the result."""
    import attngen as ag
    from attngen.analysis import Axis, facts
    from attngen.analysis import run as run_walk

    n, block = 131072, 128
    doc = (torch.arange(n) // (n // 64)).int().view(1, n)
    lines = []
    for name, spec, env in (
        ("causal window 4096", ag.Spec(mask=ag.causal() & ag.window(4096)), {}),
        ("64 documents", ag.Spec(mask=ag.documents() & ag.causal()), {"doc": doc}),
    ):
        known = facts(spec)
        scope = {**env, "b": torch.zeros(1, 1, 1, dtype=torch.int64), "h": torch.zeros(1, 1, 1, dtype=torch.int64)}
        axes = Axis("i", 0, n), Axis("j", 0, n)

        def plan(known: Any = known, scope: Any = scope, axes: Any = axes) -> Any:
            return run_walk(known.walk_keys, known.program_keys, scope, *axes, block, block)

        segments = plan()
        size = sum(t.numel() * t.element_size() for group in segments for pair in group for t in pair)
        timing = interleaved({"plan": plan}, max(5, rounds))["plan"]
        measured = {"plan": asdict(timing), "bytes": size}
        lines.append(Line(f"planning {name}, N {n}", 1e3 * timing.median, "ms", 20, False, measured))
        lines.append(Line(f"planning {name}, N {n}: size", size / 2**20, "MiB", 1, False, measured))
    return lines


def imports(rounds: int) -> list[Line]:
    """What `import attngen` adds to `import torch`."""
    code = "import time, torch; t = time.perf_counter(); import attngen; print(time.perf_counter() - t)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    timing = Timing.of(seconds)
    return [Line("import attngen after torch", timing.median, "s", 0.5, False, {"import": asdict(timing)})]


FIGURES: dict[str, Callable[[int], list[Line]]] = {
    "window": window,
    "cold": cold,
    "linear": linear,
    "dense": dense,
    "backward": backward,
    "planning": planning,
    "import": imports,
}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if one misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="FIGURE", help=f"some of: {', '.join(FIGURES)}")
    parser.add_argument("--rounds", type=int, default=11, help="runs of each candidate (default 11)")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--markdown", help="write a table to this file")
    parser.add_argument("--cold-side", choices=("attngen", "flex"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cold_side:
        print(json.dumps(cold_side(given.cold_side)))
        return 0
    lines: list[Line] = []
    for name in given.only or FIGURES:
        for line in FIGURES[name](given.rounds):
            lines.append(line)
            print(line, flush=True)
            for what, value in line.measured.items():
                if isinstance(value, dict):
                    print(
                        f"    {what}: {1e3 * value['median']:.1f} ms ({1e3 * value['p20']:.1f} .. {1e3 * value['p80']:.1f})",
                        flush=True,
                    )
    save(lines, given.json, given.markdown)
    return 0 if all(line.met for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
