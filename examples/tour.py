"""The whole of attngen in one sitting, on any machine: about a minute on two CPU cores.

python examples/tour.py [--out DIR]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from verdict import GRADIENT, here, relative, timed, verdict

import attngen as ag


def heading(text: str) -> None:
    print(f"\n== {text} " + "=" * max(0, 100 - len(text)))


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    heading("a spec: packed documents, a causal window whose width is given at the call, soft-capped scores with ALiBi")
    doc, width = ag.Tensor("doc", 2, dtype=torch.int32), ag.Param("width")
    spec = ag.Spec(
        mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i >= j) & (i - j < width),
        score=[ag.soft_cap(30.0), ag.alibi()],
        name="tour",
    )
    print(spec)
    print("key", spec.key[:16])

    heading(f"compiled and run on {device}: forward, backward, and the float64 oracle")
    shape = (1, 8, 2048, 64)
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    captures = dict(
        doc=ag.document_ids(torch.tensor([700, 900, 448])).to(device)[None],
        slope=ag.alibi_slopes(8).to(device).requires_grad_(),
        width=256,
    )
    attn = ag.compile(spec)
    start = time.perf_counter()
    result = attn(q, k, v, **captures)
    print(f"compile to first result: {time.perf_counter() - start:.3f} s")
    grads = torch.autograd.grad(result.square().mean(), [q, k, v, captures["slope"]])
    expected, _ = ag.oracle(spec, q, k, v, **captures)
    wanted = torch.autograd.grad(expected.square().mean(), [q, k, v, captures["slope"]])
    errors = {"out": relative(result, expected)}
    for name, got, want in zip(("q", "k", "v", "slope"), grads, wanted, strict=True):
        errors[f"gradient of {name}"] = relative(got, want)
    for name, error in errors.items():
        print(f"{name}: relative error {error:.1e}")

    heading("what it does and why")
    print(attn.explain(q, k, v, **captures))

    from attngen.inspect import picture

    tiles = ag.tile_map(spec, 2048, 2048, 64, 64, doc=captures["doc"], width=256)
    picture.png(tiles, out / "mask.png", "packed documents, causal window", 64, 64)
    print(f"\nthe mask as a picture: {out / 'mask.png'}")

    heading("the generated Triton source of the forward kernel")
    source = attn.source("forward", head_dim=64, dtype=torch.bfloat16)
    (out / "forward.py").write_text(source)
    print(source)

    heading("cross-compiled for an H200 (sm_90), bfloat16, head dim 64")
    for kernel in ag.cross_compile(spec, target="sm_90", dtype=torch.bfloat16, head_dim=64):
        print(
            f"{kernel.name:10} {kernel.registers:4} registers, {kernel.spills} spills, {kernel.shared:,} bytes of shared memory"
        )

    heading(f"tuned on {here()} and remembered")
    report = ag.tune(spec, shapes=["B1 H8 N2048 D64"], dtype=torch.float32, trials=4, captures=captures)
    print(report)

    heading("the second run finds the record")
    again = ag.compile(spec)
    again(q, k, v, **captures)
    told = again.explain(q, k, v, **captures)
    print(told.split("schedule on backend")[1].split("\n\n")[0])
    assert "record, exact" in told, "the second run did not find what the first one learned"

    heading("in short")
    i, j = torch.arange(2048, device=device)[:, None], torch.arange(2048, device=device)
    same = captures["doc"][0][:, None] == captures["doc"][0]
    seen = same & (i >= j) & (i - j < 256)
    with torch.no_grad():
        _, dense = timed(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        _, taken = timed(lambda: again(q, k, v, **captures))
    verdict(
        "matches dense attention in float64, gradients included, and finds what it learned",
        max(errors.values()),
        GRADIENT,
        f"{seen.numel() / int(seen.sum()):.1f}x fewer pairs",
        f"{taken / dense:.2f}x the time of SDPA with the mask as a tensor and no score, on {here()}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tour"), help="folder for the picture and the source")
    main(parser.parse_args().out)
